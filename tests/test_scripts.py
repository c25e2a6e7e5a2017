"""The three scripts as a user runs them: the whole way through, and every kind of bad input."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file

import eval as eval_script
import select_heads
import train
from lofit import errors
from lofit.errors import InputError

FAST = ["--epochs", "2", "--lr", "0.05"]


@pytest.fixture
def flags(flags, tmp_path):
    return [*flags, "--run", str(tmp_path / "run")]


def test_the_whole_way_through(flags, tmp_path, capsys):
    run = tmp_path / "run"
    select_heads.main([*flags, *FAST, "--heads", "25%"])
    heads = json.loads((run / "heads.json").read_text())
    assert len(heads["heads"]) == 3 and len(heads["scores"]) == 3
    ranked = [heads["scores"][layer][head] for layer, head in heads["heads"]]
    assert ranked == sorted(sum(heads["scores"], []), reverse=True)[:3]
    assert heads["settings"]["lr"] == 0.05 and heads["settings"]["l1"] == 1e-3

    train.main([*flags, *FAST])
    offsets = load_file(run / "offsets.safetensors")
    assert sorted(offsets["heads"].tolist()) == sorted(heads["heads"])  # by layer
    assert offsets["offsets"].shape == (3, 8)
    assert offsets["offsets"].norm(dim=1).min() > 0.01  # trained: the start is 0.003

    eval_script.main(flags)
    results = json.loads((run / "results.json").read_text())
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    about = results["adapters"]["tuned"]
    assert (results["n"], len(lines), about["trained_values"]) == (20, 20, 24)
    assert sorted(about["heads"]) == sorted(heads["heads"]) and about["offsets_hash"]
    for who in ("base", "tuned"):
        for metric, value in results["scores"][who].items():
            assert value == pytest.approx(sum(line[who][metric] for line in lines) / 20)
    scores = results["scores"]
    for metric, change in results["differences"]["tuned"].items():
        assert change["value"] == scores["tuned"][metric] - scores["base"][metric]
    for artefact in (heads, results):
        assert artefact["task"] == "mquake" and artefact["seed"] == 42
        assert artefact["fingerprint"] == heads["fingerprint"]
    assert sum(means["n"] for means in results["groups"].values()) == 20
    printed = capsys.readouterr().out
    for text in ("(flag)", "for mquake; offsets by rule", "layer   2 |", "val em_stripped",
                 "was the best on validation", "95 % interval"):  # fmt: skip
        assert text in printed
    scripts = [json.loads(line)["script"] for line in (run / "log.jsonl").open()]
    assert list(dict.fromkeys(scripts)) == ["select_heads", "train", "eval"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mquake", "clutrr", "truthfulqa-1"])
def test_the_plain_way_gives_the_same(flags, tmp_path, task):
    """One batch an epoch, so that the order is the same; scales, offsets and results agree."""
    runs = [tmp_path / name for name in ("fast", "plain")]
    for run, extra in zip(runs, ([], ["--plain"]), strict=True):
        own = [*flags[:4], "--task", task, *extra, "--run"]
        select_heads.main([*own, f"{run}-chosen", *FAST, "--batch-size", "64"])
        train.main([*own, str(run), *FAST, "--batch-size", "64", "--heads", "random"])
        eval_script.main([*own, str(run)])
    fast, plain = runs
    scores = [
        torch.tensor(json.loads(Path(f"{f}-chosen", "heads.json").read_text())["scores"])
        for f in (fast, plain)
    ]
    assert torch.allclose(*scores, rtol=1e-4)
    offsets = [load_file(f / "offsets.safetensors")["offsets"] for f in (fast, plain)]
    assert torch.allclose(*offsets, rtol=1e-3, atol=1e-5)
    told = [json.loads((f / "results.json").read_text()) for f in (fast, plain)]
    for who in ("base", "tuned"):
        assert told[0]["scores"][who] == pytest.approx(told[1]["scores"][who], abs=1e-4)
    assert [t["plain"] for t in told] == [False, True]


@pytest.mark.parametrize(("choice", "n"), [("random", 3), ("all", 12)])
def test_controls_need_no_selection_and_get_folders_of_their_own(
    flags, tmp_path, monkeypatch, choice, n
):
    monkeypatch.chdir(tmp_path)
    top = ["--top", "25%"] if choice == "random" else []
    train.main([*flags[:4], *FAST, "--heads", choice, *top])
    path = tmp_path / "runs" / "tiny" / f"mquake-{choice}" / "offsets.safetensors"
    one = load_file(path)
    assert len({tuple(head) for head in one["heads"].tolist()}) == n
    train.main([*flags[:4], *FAST, "--heads", choice, *top, "--seed", "1"])
    other = load_file(path)
    assert torch.equal(one["heads"], other["heads"]) == (choice == "all")
    assert not torch.equal(one["offsets"], other["offsets"])


def test_a_random_control_has_as_many_heads_as_its_run(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    select_heads.main([*flags[:4], *FAST, "--heads", "5"])
    for n, extra in ((5, []), (2, ["--top", "2"]), (5, ["--run", "runs/tiny/mquake-random"])):
        train.main([*flags[:4], *FAST, "--heads", "random", *extra])
        assert len(load_file("runs/tiny/mquake-random/offsets.safetensors")["heads"]) == n
    both = [*flags[:4], *FAST, "--task", "truthfulqa"]
    select_heads.main([*both, "--heads", "4", "--run", "both"])
    train.main([*both, "--heads", "random", "--run", "both-random"])
    for fold in ("truthfulqa-0", "truthfulqa-1"):
        assert len(load_file(f"both-random/{fold}/offsets.safetensors")["heads"]) == 4


def test_a_random_control_may_lie_at_the_root_of_the_disk(tiny):
    """As in a container; the folder above has no name."""
    run = SimpleNamespace(folder=Path("/run"), model=tiny, seed=1)
    run.recipe, run.setting = SimpleNamespace(heads="2"), lambda *args: args[2]
    assert len(train.choose_heads(run, "random", None)) == 2


@pytest.mark.parametrize("extra", [["--heads", "random"], ["--method", "lora"]])
def test_a_control_never_replaces_the_run(flags, extra):
    select_heads.main([*flags, *FAST, "--heads", "5"])
    refused(train, [*flags, *FAST, *extra], "run: heads.json is here, so this is the folder of LoF")


def test_other_offsets_never_replace_the_results_of_a_run(flags, tmp_path):
    select_heads.main([*flags, *FAST, "--heads", "2"])
    train.main([*flags, *FAST])
    eval_script.main(flags)
    before = (tmp_path / "run" / "results.json").read_text()
    train.main([*flags, *FAST, "--heads", "all", "--run", str(tmp_path / "other")])
    eval_script.main([*flags, "--offsets", str(tmp_path / "other")])
    assert (tmp_path / "run" / "results.json").read_text() == before
    other = json.loads((tmp_path / "run" / "results-offsets.json").read_text())
    assert len(other["adapters"]["tuned"]["heads"]) == 12


def test_heads_of_the_fold_whose_questions_are_tested_are_refused(flags, tmp_path):
    """It trained without a word: all training questions of a fold are tested in the other."""
    select_heads.main([*flags, *FAST, "--heads", "2", "--task", "truthfulqa-0"])
    argv = [*flags[:-1], str(tmp_path / "one"), *FAST, "--heads", str(tmp_path / "run")]
    message = "heads.json: truthfulqa-0 trains on questions that truthfulqa-1 tests"
    refused(train, [*argv, "--task", "truthfulqa-1"], message)
    train.main([*argv, "--task", "mquake"])  # that a choice carries over is a question


def test_heads_chosen_on_less_data_are_warned_of(flags, capsys):
    select_heads.main([*flags, *FAST, "--heads", "2", "--n-train", "4"])
    train.main([*flags, *FAST])
    assert "heads.json: chosen with n_train 4, trained with n_train None" in capsys.readouterr().err


def test_an_exports_folder_in_a_run_stops_no_script(flags, tmp_path):
    (tmp_path / "run" / ".out.123.partial").mkdir(parents=True)
    train.main([*flags, *FAST, "--heads", "random", "--top", "1"])
    assert (tmp_path / "run" / ".out.123.partial").exists()


def test_heads_of_a_file_and_the_best_of_them(flags, tmp_path):
    def trained(path, *extra):
        train.main([*flags[:-1], str(tmp_path / "own"), *FAST, "--heads", str(path), *extra])
        return load_file(tmp_path / "own" / "offsets.safetensors")["heads"].tolist()

    own = tmp_path / "mine.json"
    own.write_text("[[2, 3], [1, 1]]")
    assert trained(own) == [[1, 1], [2, 3]]
    refused(train, [*flags, "--heads", str(own), "--top", "1"], "mine.json has no scores")
    select_heads.main([*flags, *FAST, "--heads", "6"])
    heads = json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]
    assert trained(tmp_path / "run" / "heads.json", "--top", "2") == sorted(heads[:2])


def refused(script, argv, message):
    """The script ends with this message, and no artefact is there."""
    run = Path(argv[len(argv) - argv[::-1].index("--run")])
    before = {p.name for p in run.iterdir()} if run.is_dir() else set()
    with pytest.raises(InputError, match=message):
        script.main(argv)
    left = {p.name for p in run.iterdir()} if run.is_dir() else set()
    assert left - before <= {"log.jsonl", ".lock"}


REFUSED = {
    "no heads yet": (train, "", "heads.json: no such file; run select_heads.py first"),
    "no offsets yet": (eval_script, "", "run train.py first, or use --base-only"),
    "a file of heads": (train, "--heads nowhere.json", "nowhere.json: no such file"),
    "more heads": (select_heads, "--heads 13", r"number of heads 13: 13 is not in 1\.\.12"),
    "more at random": (train, "--heads random --top 13", r"13 is not in 1\.\.12"),
    "eval of random": (eval_script, "--heads random", "name it by --run .*run"),
    "base and offsets": (eval_script, "--base-only --offsets nowhere", "--offsets: --base-only as"),
    "eval of lora": (eval_script, "--method lora", "evaluates what was trained: name it by --run"),
    "heads of lora": (train, "--method lora --heads all", "--heads: --method lora does not take"),
    "the best of all": (train, "--heads all --top 3", "--top: there is nothing to choose from"),
    "strength": (train, "--method red --strength 3", "--strength: only of --method iti and repe"),
    "repe learns": (train, "--method repe --epochs 3", "--epochs: --method repe learns nothing"),
    "iti keeps": (train, "--method iti --keep best", "--keep: --method iti learns nothing"),
    "random learns": (select_heads, "--by random --l1 0", "--l1: --by random learns nothing"),
    "probe in parts": (select_heads, "--by probe --accumulate 2", "--accumulate: --by probe lear"),
    "no data": (select_heads, "--data nowhere", "nowhere/MQuAKE/train.jsonl: no such file"),
    "no data to test": (eval_script, "--data nowhere --base-only", "test.jsonl: no such file"),
    "unwritable": (select_heads, "--run {file}/run", "file/run: cannot be written .*--run"),
    "device": (train, "--device cuda:7 --heads all", "--device cuda:7: not usable here"),
    "shard": (train, "--shard --heads all", "--shard: one process has nothing to split"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(flags, tmp_path, name):
    script, extra, message = REFUSED[name]
    (tmp_path / "file").write_text("")
    refused(script, [*flags, *extra.format(file=tmp_path / "file").split()], message)


BAD_DATA = {
    "a malformed line": ("train", lambda text: text + '{"case_id": \n', "line 25: not valid JSON"),
    "nothing to train on": ("train", lambda text: "", "the split is empty"),
    "nothing to test": ("test", lambda text: "", "the split is empty"),
    "nothing to validate": ("val", lambda text: "\n\n", "the split is empty"),
    "a git-LFS pointer": ("train", lambda _: "version https://git-lfs.github.com/spec/v1\n", "LFS"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_named_before_anything_is_trained(flags, small_data, name):
    split, spoil, message = BAD_DATA[name]
    path = small_data / "MQuAKE" / f"{split}.jsonl"
    path.write_text(spoil(path.read_text()))
    refused(train, [*flags, "--heads", "all"], f"{split}.jsonl(, |: ).*{message}")


@pytest.mark.parametrize("script", [select_heads, train])
def test_a_loss_that_becomes_nan(flags, tiny_folder, tmp_path, script):
    path = tiny_folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"].fill_(3e38)  # logits overflow
    save_file(weights, path)
    extra = ["--heads", "3" if script is select_heads else "all"]
    refused(script, [*flags, *extra], "the loss became nan at step 1 of")


@pytest.mark.parametrize(
    "extra",
    ["--epochs 0", "--batch-size 0", "--lr nan", "--lr 0", "--lr inf", "--seed -1", "--epochs 2.5",
     f"--seed {2**63}", "--n-train 0", "--strength -1"],
)  # fmt: skip
def test_flags_out_of_range_are_refused(extra, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(extra.split())
    message = f"argument {extra.split()[0]}: expected a"
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_text_outside_the_terminals_characters_ends_no_evaluation(flags, tmp_path, monkeypatch):
    """It ended it after all of its work, where the answers are counted."""
    write = "".join(
        json.dumps({"prompt": "Q: Is it? A:", "answer": "Ж", "choices": ["Ж", "東"], "group": "é→"})
        + "\n" for _ in range(2)
    )  # fmt: skip
    task = tmp_path / "Страны"
    task.mkdir()
    for split in ("train", "val", "test"):
        (task / f"{split}.jsonl").write_text(write, encoding="utf-8")
    own = [*flags[:2], "--task", str(task), "--run", str(tmp_path / "run"), "--base-only"]
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    errors.run(lambda: eval_script.main(own))
    assert b"results-base.json" in terminal.getvalue() and b"?" in terminal.getvalue()


def test_half_a_surrogate_pair_is_written_and_read(flags, small_data, tmp_path):
    """It ended the evaluation where the predictions are written."""
    path = small_data / "MQuAKE" / "test.jsonl"
    case = json.loads(path.read_text().splitlines()[0]) | {"new_answer": "Nor\ud800via"}
    path.write_text(json.dumps(case) + "\n")
    eval_script.main([*flags, "--base-only"])
    line = json.loads((tmp_path / "run" / "predictions-base.jsonl").open().readline())
    assert line["answer"] == "Nor\ud800via"


def start(script, *argv):
    command = [sys.executable, str(REPO / script), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_from_the_shell_bad_input_is_one_line_and_exit_code_2(flags, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    script = start("select_heads.py", *flags)
    out, error = script.communicate(timeout=120)
    assert script.returncode == 2
    assert error.count("\n") == 1
    assert error.startswith(f"error: {tiny_folder}/config.json: ")


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_training_leaves_nothing_half_written(flags, tmp_path):
    script = start("select_heads.py", *flags, "--epochs", "100000")
    for line in script.stdout:
        if line.startswith("epoch 2/"):  # the first is saved by then
            break
    script.send_signal(signal.SIGINT)
    _, error = script.communicate(timeout=120)
    assert script.returncode == 130
    assert error.strip().endswith("the same command continues after the last whole epoch")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left - {".lock"} == {"log.jsonl", "select_heads.unfinished"}
    for line in (tmp_path / "run" / "log.jsonl").open():
        json.loads(line)
