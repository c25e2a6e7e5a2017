"""A task of one's own: its three forms, and bad lines named with file, line and key."""

import json

import pytest
from conftest import slow_but

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.tasks.own import OwnTask

FORMS = {
    "answer": {"prompt": "Q: What is the capital of it? A:", "answer": "city", "aliases": ["the"]},
    "preference": {"prompt": "Q: Who is it? A:", "chosen": "capital", "rejected": "city"},
    "choice": {"prompt": "Q: Is it? A:", "choices": ["city", "country", "the sport"], "label": 1},
}


def write(folder, lines, splits=("train", "val", "test")):
    folder.mkdir(exist_ok=True)
    for split in splits:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def test_an_answer(tmp_path):
    task = OwnTask(write(tmp_path / "mine", [FORMS["answer"]]))
    (example,) = task.read(None, "val")
    assert (example.prompt, example.answer) == (FORMS["answer"]["prompt"], "city")
    assert example.rejected is None and not example.right
    for continuation, em in (
        ("city", 1), (" City \nand more", 1), ("\n the", 1), ("cities", 0), ("", 0), ("A: city", 0),
    ):  # fmt: skip
        assert task.score(task.extract(example.prompt, continuation), example) == {"em": em}


def test_a_preference(tmp_path):
    task = OwnTask(write(tmp_path / "mine", [FORMS["preference"]]))
    (example,) = task.read(None, "test")
    assert (example.answer, example.rejected) == ("capital", "city")
    assert (example.right, example.wrong) == (("capital",), ("city",))
    assert task.score_choices([-1.0], [-2.0]) == {"accuracy": 1}
    assert task.score_choices([-2.0], [-1.0]) == {"accuracy": 0}


def test_a_choice(tmp_path):
    task = OwnTask(write(tmp_path / "mine", [FORMS["choice"]]))
    (example,) = task.read(None, "train")
    assert example.answer == "country" and example.rejected is None
    assert (example.right, example.wrong) == (("country",), ("city", "the sport"))
    assert task.score_choices([-2.0], [-3.0, -1.0]) == {"accuracy": 0}


@pytest.mark.parametrize("form", slow_but(["answer"], FORMS))
def test_every_form_runs_the_whole_way_through(tiny_folder, tmp_path, form, capsys):
    folder = write(tmp_path / "mine", [FORMS[form]] * 6)
    flags = ["--model", str(tiny_folder), "--task", str(folder), "--run", str(tmp_path / "run")]
    select_heads.main([*flags, "--epochs", "1", "--heads", "4"])
    train.main([*flags, "--epochs", "40", "--lr", "0.5"])
    eval_script.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == "mine" and results["n"] == 6
    metric = "em" if form == "answer" else "accuracy"
    assert list(results["tuned"]) == [metric]
    assert results["tuned"][metric] == 1  # six times the same line, learnt by heart
    assert f"val {metric} 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "line", "message"),
    [
        ("answer", {"answer": 3}, "line 2: key 'answer': expected a text, found 3"),
        ("answer", {"prompt": " "}, "line 2: key 'prompt': expected a text, found ' '"),
        ("answer", {"aliases": "city"}, "line 2: key 'aliases': expected a list"),
        ("answer", {"aliases": [""]}, "line 2: expected a text, found ''"),
        ("answer", {"answer": None}, "line 2: key 'answer': expected a text, found None"),
        ("preference", {"rejected": ""}, "line 2: key 'rejected': expected a text"),
        ("choice", {"choices": ["one"]}, "line 2: key 'choices': expected a list of at least two"),
        ("choice", {"label": 3}, "line 2: key 'label': expected 0 to 2, found 3"),
        ("choice", {"label": "1"}, "line 2: key 'label': expected 0 to 2, found '1'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, form, line, message):
    task = OwnTask(write(tmp_path / "mine", [FORMS[form], FORMS[form] | line]))
    with pytest.raises(InputError, match=f"train.jsonl, {message}"):
        task.read(None, "train")


def test_a_missing_key_is_named(tmp_path):
    task = OwnTask(write(tmp_path / "mine", [FORMS["choice"], {"prompt": "Q:", "label": 0}]))
    with pytest.raises(InputError, match="val.jsonl, line 2: key 'choices' is missing"):
        task.read(None, "val")


@pytest.mark.parametrize(
    "line", [{"prompt": "Q:"}, {"question": "?"}, FORMS["answer"] | FORMS["choice"]]
)
def test_a_line_of_no_form_is_refused(tmp_path, line):
    with pytest.raises(InputError, match="train.jsonl, line 1: expected the keys of one form"):
        OwnTask(write(tmp_path / "mine", [line]))


def test_no_such_task(tiny_folder, tmp_path):
    argv = ["--model", str(tiny_folder), "--task", str(tmp_path / "nowhere")]
    with pytest.raises(InputError, match="neither one of clutrr, mquake, truthfulqa nor a folder"):
        select_heads.main(argv)
    with pytest.raises(InputError, match="train.jsonl: no such file"):
        select_heads.main([*argv[:3], str(tmp_path)])
