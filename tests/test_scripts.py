"""The three scripts as a user runs them: the whole way through, and every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO, slow_but
from safetensors.torch import load_file, save_file

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError

FAST = ["--epochs", "2", "--lr", "0.05"]


@pytest.fixture
def flags(tiny_folder, small_data, tmp_path):
    return ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "run")]


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
    assert offsets["heads"].tolist() == heads["heads"]
    assert offsets["offsets"].shape == (3, 8)
    assert offsets["offsets"].norm(dim=1).min() > 0.01  # trained: the start is 0.003

    eval_script.main(flags)
    results = json.loads((run / "results.json").read_text())
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert (results["n"], len(lines), results["trained_values"]) == (20, 20, 24)
    assert results["heads"] == heads["heads"]
    for who in ("base", "tuned"):
        for metric, value in results[who].items():
            assert value == pytest.approx(sum(line[who][metric] for line in lines) / 20)
    for metric, change in results["difference"].items():
        assert change["value"] == results["tuned"][metric] - results["base"][metric]
    for artefact in (heads, results):
        assert artefact["task"] == "mquake" and artefact["seed"] == 42
        assert artefact["fingerprint"] == heads["fingerprint"]
    printed = capsys.readouterr().out
    for text in (
        "(flag)",
        "for mquake; offsets by rule",
        "layer   2 |",
        "val em_stripped",
        "95 % interval",
    ):
        assert text in printed
    scripts = [json.loads(line)["script"] for line in (run / "log.jsonl").open()]
    assert list(dict.fromkeys(scripts)) == ["select_heads", "train", "eval"]


def test_the_same_seed_gives_the_same_heads_and_offsets(flags, tmp_path):
    def once(seed, run):
        own = [*flags[:-1], str(tmp_path / run), "--seed", seed]
        select_heads.main([*own, *FAST, "--heads", "3"])
        train.main([*own, *FAST])
        return load_file(tmp_path / run / "offsets.safetensors")

    one, two, other = once("1", "a"), once("1", "b"), once("2", "c")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["offsets"], other["offsets"])


@pytest.mark.parametrize("task", slow_but(["truthfulqa"], ["mquake", "clutrr", "truthfulqa"]))
def test_the_plain_way_gives_the_same(flags, tmp_path, task):
    """One batch an epoch, so that the order is the same; scales, offsets and results agree."""
    runs = [tmp_path / name for name in ("fast", "plain")]
    fold = ["--fold", "1"] if task == "truthfulqa" else []
    for run, extra in zip(runs, ([], ["--plain"]), strict=True):
        own = [*flags[:4], "--run", str(run), "--task", task, *fold, *extra]
        select_heads.main([*own, *FAST, "--batch-size", "64"])
        train.main([*own, *FAST, "--batch-size", "64", "--heads", "random"])
        eval_script.main(own)
    fast, plain = (run / "fold1" if task == "truthfulqa" else run for run in runs)
    scores = [
        torch.tensor(json.loads((f / "heads.json").read_text())["scores"]) for f in (fast, plain)
    ]
    assert torch.allclose(*scores, rtol=1e-4)
    offsets = [load_file(f / "offsets.safetensors")["offsets"] for f in (fast, plain)]
    assert torch.allclose(*offsets, rtol=1e-3, atol=1e-5)
    told = [json.loads((f / "results.json").read_text()) for f in (fast, plain)]
    for who in ("base", "tuned"):
        assert told[0][who] == pytest.approx(told[1][who], abs=1e-4)
    assert [t["plain"] for t in told] == [False, True]


@pytest.mark.parametrize(("choice", "n"), [("random", 3), ("all", 12)])
def test_controls_need_no_selection_and_get_folders_of_their_own(
    flags, tmp_path, monkeypatch, choice, n
):
    monkeypatch.chdir(tmp_path)
    top = ["--top", "25%"] if choice == "random" else []
    train.main([*flags[:4], *FAST, "--heads", choice, *top])
    path = tmp_path / "runs" / "tiny" / f"mquake-{choice}" / "offsets.safetensors"
    heads = load_file(path)["heads"].tolist()
    assert len({tuple(head) for head in heads}) == n
    train.main([*flags[:4], *FAST, "--heads", choice, *top, "--seed", "1"])
    assert (load_file(path)["heads"].tolist() == heads) == (choice == "all")


def test_top_takes_the_best_of_a_heads_file(flags, tmp_path):
    select_heads.main([*flags, *FAST, "--heads", "6"])
    heads = json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]
    again = [*flags[:-1], str(tmp_path / "top")]
    train.main([*again, *FAST, "--heads", str(tmp_path / "run" / "heads.json"), "--top", "2"])
    assert load_file(tmp_path / "top" / "offsets.safetensors")["heads"].tolist() == heads[:2]


def test_base_only_needs_no_offsets_and_is_the_base_of_a_full_run(flags, tmp_path):
    def predictions(who, name="predictions-val.jsonl"):
        with (tmp_path / "run" / name).open() as lines:
            return [json.loads(line)[who] for line in lines]

    eval_script.main([*flags, "--base-only", "--split", "val"])
    results = json.loads((tmp_path / "run" / "results-val-base.json").read_text())
    assert results["split"] == "val" and results["n"] == 12
    assert "tuned" not in results and results["trained_values"] == 0
    alone = predictions("base", "predictions-val-base.jsonl")
    train.main([*flags, "--epochs", "2", "--lr", "1", "--heads", "all"])
    eval_script.main([*flags, "--split", "val"])
    assert predictions("base") == alone != predictions("tuned")


@pytest.mark.slow
def test_the_base_models_answers_can_come_from_another_run(flags, tmp_path, monkeypatch):
    """They are the same; of another split, dtype or other questions they are refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    train.main([*flags, "--run", str(first), "--heads", "all", "--epochs", "1"])
    eval_script.main([*flags, "--run", str(first)])
    train.main([*flags, "--run", str(second), "--heads", "random", "--epochs", "1"])
    eval_script.main([*flags, "--run", str(second)])
    want = json.loads((second / "results.json").read_text())
    asked, evaluate = [], eval_script.evaluate
    monkeypatch.setattr(
        eval_script, "evaluate", lambda *args: asked.append(args[3]) or evaluate(*args)
    )
    again = [*flags, "--run", str(second), "--base-from", str(first)]
    eval_script.main(again)
    assert asked == ["tuned model"]
    assert json.loads((second / "results.json").read_text()) == want
    for extra in (["--split", "val"], ["--dtype", "bfloat16"], ["--plain"]):
        with pytest.raises(InputError, match="leave --base-from out"):
            eval_script.main([*again, *extra])


def test_default_run_folder_is_named_by_model_and_task(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eval_script.main([*flags[:4], "--base-only"])
    assert (tmp_path / "runs" / "tiny" / "mquake" / "results-base.json").exists()


def refused(script, argv, message, run):
    """The script ends with a message of one line, and no artefact is there."""
    with pytest.raises(InputError, match=message) as caught:
        script.main(argv)
    assert "\n" not in str(caught.value)
    left = {p.name for p in run.iterdir()} if run.is_dir() else set()
    assert left <= {"log.jsonl"}


def test_steps_out_of_order(flags, tmp_path):
    refused(train, flags, "heads.json: no such file; run select_heads.py first", tmp_path / "run")
    refused(eval_script, flags, "run train.py first, or use --base-only", tmp_path / "run")


def test_more_heads_than_the_model_has(flags, tmp_path):
    message = r"number of heads 13: 13 is not in 1\.\.12"
    refused(select_heads, [*flags, "--heads", "13"], message, tmp_path / "run")
    refused(train, [*flags, "--heads", "random", "--top", "13"], message, tmp_path / "run")


def test_a_malformed_line(flags, small_data, tmp_path):
    with (small_data / "MQuAKE" / "train.jsonl").open("a") as file:
        file.write('{"case_id": \n')
    refused(select_heads, flags, "train.jsonl, line 25: not valid JSON", tmp_path / "run")


@pytest.mark.parametrize(("script", "split"), [(select_heads, "train"), (eval_script, "test")])
def test_an_empty_split(flags, small_data, tmp_path, script, split):
    (small_data / "MQuAKE" / f"{split}.jsonl").write_text("")
    extra = ["--base-only"] if script is eval_script else []
    refused(script, [*flags, *extra], f"{split}.jsonl: the split is empty", tmp_path / "run")


def test_no_data_at_all(flags, tmp_path):
    argv = [*flags, "--data", str(tmp_path / "nowhere")]
    refused(select_heads, argv, "nowhere/MQuAKE/train.jsonl: no such file", tmp_path / "run")


def test_a_prompt_longer_than_the_models_positions(flags, small_data, tmp_path):
    path = small_data / "MQuAKE" / "test.jsonl"
    case = json.loads(path.read_text().splitlines()[0])
    case["questions"][0] = "the " * 270
    path.write_text(json.dumps(case) + "\n")
    argv = [*flags, "--base-only"]
    refused(eval_script, argv, "prompt 0 has 2.. tokens.*256 positions", tmp_path / "run")
    shutil.copy(path, small_data / "MQuAKE" / "train.jsonl")
    refused(select_heads, flags, "split train: example 0 has 2.. tokens", tmp_path / "run")


def test_heads_of_another_model(flags, tiny_folder, tmp_path):
    select_heads.main([*flags, *FAST])
    weights = load_file(tiny_folder / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, tiny_folder / "model.safetensors")
    with pytest.raises(InputError, match="heads.json: made with .*run the step before again"):
        train.main([*flags, *FAST])
    assert not (tmp_path / "run" / "offsets.safetensors").exists()


@pytest.mark.parametrize("script", [select_heads, train])
def test_a_loss_that_becomes_nan(flags, tiny_folder, tmp_path, script):
    path = tiny_folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"].fill_(3e38)  # logits overflow
    save_file(weights, path)
    extra = ["--heads", "3" if script is select_heads else "all"]
    refused(script, [*flags, *extra], "the loss became nan at step 1 of", tmp_path / "run")


def test_a_run_folder_that_cannot_be_written(flags, tmp_path):
    (tmp_path / "file").write_text("")
    argv = [*flags[:-1], str(tmp_path / "file" / "run")]
    with pytest.raises(InputError, match="file/run: cannot be written .*--run"):
        select_heads.main(argv)


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
    assert error.startswith(f"error: {tiny_folder}/config.json: model_type 'bert' is not supported")


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_training_leaves_nothing_half_written(flags, tmp_path):
    script = start("select_heads.py", *flags, "--epochs", "100000")
    for line in script.stdout:
        if line.startswith("epoch 1/"):
            break
    script.send_signal(signal.SIGINT)
    _, error = script.communicate(timeout=120)
    assert script.returncode == 130
    assert error.strip() == "interrupted: nothing half-written was left behind"
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {"log.jsonl", "select_heads.unfinished"}
    for line in (tmp_path / "run" / "log.jsonl").open():
        json.loads(line)
