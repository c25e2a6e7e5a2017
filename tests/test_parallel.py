"""Several processes do what one does: the same heads, offsets and results, and end together."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, end_group, start_group
from safetensors.torch import load_file

import eval as eval_script
import select_heads
import train
from lofit.distributed import SharedObjective
from lofit.errors import InputError
from lofit.fast.hidden_cache import HiddenCache
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, Preference

FAST = ["--epochs", "2", "--lr", "0.02", "--batch-size", "5"]
# run -> flags: batches of 5 and a last one of 4, 2 or 5; a batch of fewer rows than processes
RUNS = {
    "mquake": [],
    "clutrr": ["--task", "clutrr", "--plain"],
    "truthfulqa": ["--task", "truthfulqa-1"],
    "few": ["--n-train", "2"],
}


def calls(flags, folder, runs):
    """Each run's way through the scripts."""
    found = []
    for name in runs:
        own = [*flags, *RUNS[name], "--run", str(folder / name)]
        evaluated = [flag for flag in own if flag not in ("--n-train", "2")]
        found.append(("select_heads", [*own, *FAST, "--heads", "4"]))
        found.append(("train", [*own, *FAST]))
        found.append(("eval", [*evaluated, "--batch-size", "3"]))
    return found


def alone(found):
    for name, argv in found:
        {"select_heads": select_heads, "train": train, "eval": eval_script}[name].main(argv)


def assert_same(one, other):
    """Of two run folders: heads, scores, offsets, results and predictions."""
    heads = [json.loads((run / "heads.json").read_text()) for run in (one, other)]
    assert heads[0]["heads"] == heads[1]["heads"]
    scores = [torch.tensor(h["scores"]) for h in heads]
    assert (scores[0] - scores[1]).abs().max() <= 1e-6
    offsets = [load_file(run / "offsets.safetensors")["offsets"] for run in (one, other)]
    assert (offsets[0] - offsets[1]).abs().max() <= 1e-6
    assert offsets[0].abs().max() > 0.02
    results = [json.loads((run / "results.json").read_text())["scores"] for run in (one, other)]
    lines = [[json.loads(x) for x in (run / "predictions.jsonl").open()] for run in (one, other)]
    for who in ("base", "tuned"):
        assert results[0][who] == pytest.approx(results[1][who], abs=1e-6)
        for a, b in zip(*lines, strict=True):
            assert a[who].get("prediction") == b[who].get("prediction")
            for side, values in a[who].get("log_probs", {}).items():
                assert values == pytest.approx(b[who]["log_probs"][side], rel=1e-5)
    logs = [[json.loads(x) for x in (run / "log.jsonl").open()] for run in (one, other)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-4)


TEXTS = [
    ("Q: Who is it? A:", "the capital", "city"),
    ("Q: What is the sport of it? A:", "city", "the capital of the country"),
    ("Q: Is it? A:", "country", "sport"),
]


def losses(model, tokenizer, wrap=lambda objective: objective) -> list[float]:
    """Loss, weight and gradients of both objectives, again for rows whose states the first time
    kept, and for fewer rows than processes."""
    found = []
    for kind, n in ((CrossEntropy, 2), (Preference, 3)):
        objective = wrap(kind(model, tokenizer, [text[:n] for text in TEXTS]))
        parameters = attach_offsets(model, [(1, 0), (2, 3)], torch.ones(2, 8))
        for rows in ([0, 1, 2], [2, 0, 1], [1]):
            batch = objective.batch(rows)
            loss = objective.loss(batch)
            gradients = torch.autograd.grad(loss, parameters)
            found += [loss.item(), objective.weight(batch)]
            found += torch.cat([g.flatten() for g in gradients]).tolist()
            with torch.no_grad():
                found.append(objective.loss(batch).item())
    return found


def main(argv: list[str]) -> None:
    """One of the processes of the next test; of one further down, given a script's flags."""
    from lofit.distributed import join

    if len(argv) > 1:
        stop_after_an_epoch()
        return train.main(argv)
    join("cpu")
    found = losses(
        load_model(argv[0]), load_tokenizer(argv[0]), lambda o: SharedObjective(HiddenCache(o))
    )
    sys.__stdout__.write(json.dumps(found))


def stop_after_an_epoch() -> None:
    """As a process that is ended from outside, but in all of them at once."""
    save = train.save_epoch

    def stop(run, epoch, *rest):
        save(run, epoch, *rest)
        raise InputError("stopped")

    train.save_epoch = stop


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_process(tiny_folder):
    group = start_group(2, ("test_parallel", [str(tiny_folder)]))
    want = losses(load_model(tiny_folder), load_tokenizer(tiny_folder))
    assert max(want) > 0.1
    for code, out, error in end_group(group):
        assert code == 0, error
        assert json.loads(out) == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
def test_the_whole_way_through_is_that_of_one_process(flags, tmp_path):
    group = start_group(3, *calls(flags, tmp_path / "group", RUNS))
    alone(calls(flags, tmp_path / "one", RUNS))
    ended = end_group(group)
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert all(not out for _, out, _ in ended[1:])  # the first alone prints
    for name in RUNS:
        assert_same(tmp_path / "one" / name, tmp_path / "group" / name)
        assert {p.name for p in (tmp_path / "group" / name).iterdir()} == {
            p.name for p in (tmp_path / "one" / name).iterdir()
        }


@pytest.mark.slow
def test_bad_input_is_one_line_and_ends_all(flags, tmp_path):
    argv = [*flags, "--run", str(tmp_path / "run"), "--heads", "all"]
    group = start_group(2, ("train", [*argv, "--data", str(tmp_path / "nowhere")]))
    ended = end_group(group, 120)
    assert [code for code, _, _ in ended] == [2, 2]
    (line,) = [text for _, _, error in ended for text in error.splitlines() if "error" in text]
    assert "train.jsonl: no such file" in line


def torchrun(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--", *argv], cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_keeps_the_epochs_that_were_done(flags, tmp_path):
    """Under torchrun itself; the next test continues a stopped group."""
    train_flags = ["--heads", "all", "--lr", "0.01", "--epochs", "10000"]
    run = tmp_path / "run"
    agent = torchrun("train.py", *flags, "--run", str(run), *train_flags)
    for line in agent.stdout:
        if line.startswith("epoch 2/"):
            break
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    start = time.time()
    os.kill(int(workers[1]), signal.SIGKILL)
    agent.communicate(timeout=60)
    assert agent.returncode != 0 and time.time() - start < 45
    for pid in map(int, workers):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not (run / "offsets.safetensors").exists() and not list(run.glob(".*.partial"))
    assert torch.load(run / "train.unfinished")["epoch"] >= 1


@pytest.mark.slow
def test_a_stopped_group_continues_to_the_same_values(flags, tmp_path):
    argv = [*flags, *FAST, "--heads", "all", "--epochs", "3", "--run"]
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    calls = (("train", [*argv, whole]), ("test_parallel", [*argv, stopped]))
    ended = end_group(start_group(2, *calls))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "error: stopped\n" in ended[0][2] + ended[1][2]
    ended = end_group(start_group(2, ("train", [*argv, stopped])))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "continuing after epoch 1" in ended[0][1]
    one, two = (load_file(tmp_path / n / "offsets.safetensors") for n in ("whole", "stopped"))
    assert torch.equal(one["offsets"], two["offsets"])
