"""A task of one's own: its five forms, and bad lines named with file, line and key."""

import json

import pytest
from conftest import slow_but
from lofit.run.evaluation import evaluate
from lofit.run.session import Session

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.tasks import first_option
from lofit.tasks.own import OwnTask

FORMS = {
    "answer": {"prompt": "Q: What is the capital of it? A:", "answer": "city", "aliases": ["the"]},
    "option": {"prompt": "Q: Is it? A:", "answer": "city", "choices": ["country", "city"]},
    "number": {"prompt": "Q: What is it? A:", "answer": "1 + 1 = 2", "value": 2},
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


def test_an_option_is_the_first_that_occurs_in_what_is_generated(tmp_path):
    line = {"prompt": "Q:", "answer": " answer2", "choices": [" answer1", " answer2", " answer10"]}
    task = OwnTask(write(tmp_path / "mine", [line]))
    (example,) = task.read(None, "test")
    assert (task.METRICS, task.MAIN_METRIC, task.MAX_NEW_TOKENS) == (("em", "accuracy"), "em", 32)
    assert example.generated and example.right == (" answer2",)
    assert example.wrong == (" answer1", " answer10")
    for continuation, em in (
        (" answer2", 1), ("\n\nthe correct answer is answer2, not answer1", 1), ("", 0), ("2", 0),
        (" answer1 or answer2", 0), ("Answer2", 0), ("answer10 answer2", 0), ("answer20", 1),
    ):  # fmt: skip
        assert task.score(task.extract(example.prompt, continuation), example) == {"em": em}
    assert first_option("answer10", ("answer1", "answer10")) == "answer10"
    assert task.score_choices([-1.0], [-2.0, -3.0]) == {"accuracy": 1}


def test_false_is_a_text_and_not_true(tmp_path):
    line = {"prompt": "Q:", "answer": " false", "choices": [" true", " false"]}
    task = OwnTask(write(tmp_path / "mine", [line]))
    (example,) = task.read(None, "test")
    assert (example.answer, example.right, example.wrong) == (" false", (" false",), (" true",))
    assert task.score("false", example) == {"em": 1} and task.score("true", example) == {"em": 0}


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("( 76 - 25 ) = 51", 51, 1), ("51 dollars, 3 packs", 51, 0), ("so it is -5.", -5, 1),
        ("so it is 5", -5, 0), ("1,234,567", 1234567, 1), ("#### 1,200", 1200, 1), ("7.0", 7, 1),
        ("3.0009", 3, 1), ("3.0011", 3, 0), ("fifty-one", 51, 0), ("", 0, 0), ("9" * 999, 51, 0),
    ],
)  # fmt: skip
def test_a_number_is_the_last_one_generated(tmp_path, text, value, right):
    line = {"prompt": "Q:", "answer": " 2 + 2 = 4", "value": value}
    task = OwnTask(write(tmp_path / "mine", [line]))
    (example,) = task.read(None, "test")
    assert example.generated and (task.METRICS, task.MAX_NEW_TOKENS) == (("accuracy",), 256)
    assert task.score(task.extract("Q:", f"\nOf 3,\n{text}\n" if text else ""), example) == {
        "accuracy": right
    }


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


@pytest.mark.parametrize("form", slow_but(["answer"], [f for f in FORMS if f != "number"]))
def test_every_form_runs_the_whole_way_through(tiny_folder, tmp_path, form, capsys):
    folder = write(tmp_path / "mine", [FORMS[form]] * 6)
    flags = ["--model", str(tiny_folder), "--task", str(folder), "--run", str(tmp_path / "run")]
    select_heads.main([*flags, "--epochs", "1", "--heads", "4"])
    train.main([*flags, "--epochs", "40", "--lr", "0.5"])
    eval_script.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == "mine" and results["n"] == 6
    metrics = {"answer": ["em"], "option": ["em", "accuracy"]}.get(form, ["accuracy"])
    assert list(results["tuned"]) == metrics
    assert set(results["tuned"].values()) == {1}  # six times the same line, learnt by heart
    assert f"val {metrics[0]} 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "line", "message"),
    [
        ("answer", {"answer": 3}, "line 2: key 'answer': expected a text, found 3"),
        ("answer", {"prompt": " "}, "line 2: key 'prompt': expected a text, found ' '"),
        ("answer", {"aliases": "city"}, "line 2: key 'aliases': expected a list"),
        ("answer", {"aliases": [""]}, "line 2: expected a text, found ''"),
        ("answer", {"answer": None}, "line 2: key 'answer': expected a text, found None"),
        ("answer", {"group": 3}, "line 2: key 'group': expected a text, found 3"),
        ("option", {"answer": "town"}, "line 2: key 'answer': expected one of the choices, found"),
        ("option", {"choices": ["city"] * 2}, "line 2: key 'choices': expected different texts"),
        (
            "choice",
            {"choices": [" a", "a"], "label": 0},
            "line 2: key 'choices': expected different",
        ),
        (
            "option",
            {"aliases": ["city"]},
            "line 2: key 'aliases' stands only beside prompt, answer",
        ),
        ("option", {"choices": "city"}, "line 2: key 'choices': expected a list of at least"),
        ("number", {"value": "2"}, "line 2: key 'value': expected a number up to 1e15, found '2'"),
        ("number", {"value": True}, "line 2: key 'value': expected a number up to 1e15"),
        ("number", {"value": float("nan")}, "line 2: .*"),
        ("number", {"value": 10**400}, "line 2: key 'value': expected a number up to 1e15"),
        ("preference", {"rejected": ""}, "line 2: key 'rejected': expected a text"),
        ("choice", {"choices": ["one"]}, "line 2: key 'choices': expected a list of at least two"),
        ("choice", {"label": 3}, "line 2: key 'label': expected 0 to 2, found 3"),
        ("choice", {"label": "1"}, "line 2: key 'label': expected 0 to 2, found '1'"),
        ("choice", {"label": True}, "line 2: key 'label': expected 0 to 2, found True"),
    ],
)
def test_a_bad_line_is_named(tmp_path, form, line, message):
    task = OwnTask(write(tmp_path / "mine", [FORMS[form], FORMS[form] | line]))
    with pytest.raises(InputError, match=f"train.jsonl, {message}"):
        task.read(None, "train")


def test_lines_of_two_forms_do_not_go_together(tmp_path):
    """A test split of numbers would be scored by exact match."""
    lines = [{"prompt": "Q:", "answer": " 2 + 2 = 4"}, {"prompt": "Q:", "answer": " 4", "value": 4}]
    task = OwnTask(write(tmp_path / "mine", lines))
    keys = "line 2: has the keys prompt, answer, value; expected prompt, answer, as in"
    with pytest.raises(InputError, match=f"test.jsonl, {keys}"):
        task.read(None, "test")


def test_a_missing_key_is_named(tmp_path):
    task = OwnTask(write(tmp_path / "mine", [FORMS["choice"], {"prompt": "Q:", "label": 0}]))
    with pytest.raises(InputError, match="val.jsonl, line 2: key 'choices' is missing"):
        task.read(None, "val")


@pytest.mark.parametrize(
    "line",
    [{"prompt": "Q:"}, {"question": "?"}, FORMS["answer"] | FORMS["choice"],
             FORMS["option"] | FORMS["number"], FORMS["option"] | {"label": 0}],
)  # fmt: skip
def test_a_line_of_no_form_is_refused(tmp_path, line):
    with pytest.raises(InputError, match="train.jsonl, line 1: expected the keys of one form"):
        OwnTask(write(tmp_path / "mine", [line]))


def test_no_such_task(tiny_folder, tmp_path):
    argv = ["--model", str(tiny_folder), "--task", str(tmp_path / "nowhere")]
    with pytest.raises(InputError, match="neither one of clutrr, .*, gsm8k, listops nor a folder"):
        select_heads.main(argv)
    with pytest.raises(InputError, match="train.jsonl: no such file"):
        select_heads.main([*argv[:3], str(tmp_path)])


def test_a_task_with_a_name_without_its_folder(tiny_folder, tmp_path):
    argv = ["--model", str(tiny_folder), "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    with pytest.raises(InputError, match="boolq: no such folder; `python -m data.download boolq`"):
        select_heads.main([*argv, "--task", "boolq"])
    with pytest.raises(InputError, match="listops: no such folder; `python -m data.listops`"):
        select_heads.main([*argv, "--task", "listops"])


@pytest.mark.slow
def test_groups_and_answers_are_reported(tiny_folder, tmp_path, capsys):
    lines = [FORMS["option"] | {"group": f"depth {d}"} for d in (10, 2, 2)]
    lines += [FORMS["option"] | {"answer": "country"}] * 2
    folder = write(tmp_path / "mine", lines)
    eval_script.main(
        ["--model", str(tiny_folder), "--task", str(folder), "--run", str(tmp_path / "run"),
         "--base-only"]
    )  # fmt: skip
    results = json.loads((tmp_path / "run" / "results-base.json").read_text())
    assert results["always"] == {"answer": "city", "share": 0.6}
    given = results["given"]["base"]
    assert list(given) == ["city", "country", "other"] and sum(given.values()) == 5
    groups = results["groups"]
    assert [(g, means["n"]) for g, means in groups.items()] == [
        ("", 2), ("depth 2", 2), ("depth 10", 1)
    ]  # fmt: skip
    for metric in ("em", "accuracy"):
        total = sum(means["n"] * means["base"][metric] for means in groups.values())
        assert total / 5 == pytest.approx(results["base"][metric])
    printed = capsys.readouterr().out
    assert "always 'city' would score 60.0%" in printed and "depth 10 (1 items)" in printed


@pytest.mark.slow
def test_a_stopped_evaluation_mixes_up_no_scores(tiny_folder, tmp_path):
    """Both ways have the same row; what is kept of one is not taken for the other."""
    folder = write(tmp_path / "mine", [FORMS["option"]])
    argv = ["--model", str(tiny_folder), "--task", str(folder), "--run", str(tmp_path / "run")]
    run = Session(eval_script.parse_args(argv), "eval")
    next(run.folds())
    found = [evaluate(run, run.read("test"), 64, "")]
    assert [set(row) for row in found[0]] == [{"prediction", "em", "log_probs", "accuracy"}]
    for _ in range(2):  # the second time from what was kept
        kept = run.scored_batches({}, run.read("test"))("base")
        found.append(evaluate(run, run.read("test"), 64, "", kept))
    assert found[0] == found[1] == found[2]
