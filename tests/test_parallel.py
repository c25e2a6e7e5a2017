"""Several processes do what one does: the same heads, offsets and results, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import REPO, end_group, start_group
from lofit.distributed.loss import DistributedObjective
from safetensors.torch import load_file

import eval as eval_script
import select_heads
import train
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, Preference

FAST = ["--epochs", "2", "--lr", "0.02", "--batch-size", "5"]
# run -> flags: batches of 5 and a last one of 4, 2 or 5; a batch of fewer rows than processes
RUNS = {
    "mquake": [],
    "clutrr": ["--task", "clutrr", "--plain"],
    "truthfulqa": ["--task", "truthfulqa", "--fold", "1"],
    "few": ["--n-train", "2"],
}


@pytest.fixture
def flags(tiny_folder, small_data):
    return ["--model", str(tiny_folder), "--data", str(small_data)]


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
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
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


def folder_of(run, name):
    return run / name / "fold1" if name == "truthfulqa" else run / name


TEXTS = [
    ("Q: Who is it? A:", "the capital", "city"),
    ("Q: What is the sport of it? A:", "city", "the capital of the country"),
    ("Q: Is it? A:", "country", "sport"),
]


def losses(folder, wrap=lambda objective: objective) -> list[float]:
    """Loss and gradients of both objectives, again for rows whose states the first time kept, and
    for fewer rows than processes."""
    model, tokenizer, found = load_model(folder), load_tokenizer(folder), []
    for kind, n in ((CrossEntropy, 2), (Preference, 3)):
        objective = wrap(kind(model, tokenizer, [text[:n] for text in TEXTS], "here"))
        parameters = attach_offsets(model, [(1, 0), (2, 3)], torch.ones(2, 8))
        for rows in ([0, 1, 2], [2, 0, 1], [1]):
            loss = objective.loss(rows)
            gradients = torch.autograd.grad(loss, parameters)
            found += [loss.item(), *torch.cat([g.flatten() for g in gradients]).tolist()]
    return found


def main(argv: list[str]) -> None:
    """One of the processes of the next test."""

    def distributed(objective):
        objective.hash = ""
        return DistributedObjective(objective, nullcontext, nullcontext)

    found = losses(argv[0], distributed)
    sys.__stdout__.write(json.dumps(found))


def test_losses_and_gradients_are_those_of_one_process(tiny_folder):
    group = start_group(2, ("test_parallel", [str(tiny_folder)]))
    want = losses(tiny_folder)
    assert max(want) > 0.1
    for code, out, error in end_group(group):
        assert code == 0, error
        assert json.loads(out) == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "runs"), [(2, ["mquake"]), (3, RUNS)])
def test_the_whole_way_through_is_that_of_one_process(flags, tmp_path, n, runs):
    group = start_group(n, *calls(flags, tmp_path / "group", runs))
    alone(calls(flags, tmp_path / "one", runs))
    ended = end_group(group)
    assert [code for code, _, _ in ended] == [0] * n, ended
    for name in runs:
        assert_same(folder_of(tmp_path / "one", name), folder_of(tmp_path / "group", name))
    assert "95 % interval" in ended[0][1]
    assert [(out, error) for _, out, error in ended[1:]] == [("", "")] * (n - 1)


def one_line(ended, message, code=2):
    """Every process ended with the code, and one of them with this line alone."""
    assert [c for c, _, _ in ended] == [code] * len(ended), ended
    (line,) = "".join(error for _, _, error in ended).splitlines()
    assert message in line


@pytest.mark.slow
def test_bad_input_and_a_process_of_other_arguments_are_one_line(flags, small_data, tmp_path):
    own = [*flags, "--run", str(tmp_path / "run")]
    other = start_group(2, ("train", [*own, "--heads", "all", "--data", str(tmp_path / "nowhere")]))
    one_line(end_group(other), "train.jsonl: no such file")


@pytest.mark.slow
def test_processes_of_other_arguments_are_told(flags, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = [*flags, "--run", str(tmp_path / "run"), "--heads", "all", "--lr"]
    one, other = (start_group(2, ("train", [*own, lr]), port=port, ranks=[i])[0]
                  for i, lr in enumerate(("0.1", "0.2")))  # fmt: skip
    one_line(end_group([one, other]), "the arguments of process 1 differ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_busy_port_is_one_line(flags):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        start = time.time()
        (first,) = start_group(1, ("train", flags), port=port)
        one_line(end_group([first]), f"the processes do not meet at 127.0.0.1:{port}")
        assert time.time() - start < 60


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_files_stay(flags, tmp_path):
    """By torchrun itself."""
    run = tmp_path / "run"
    train.main([*flags, "--run", str(tmp_path / "one"), "--heads", "all", "--epochs", "1"])
    shutil.copytree(tmp_path / "one", run)  # this process holds the first
    before = (run / "offsets.safetensors").read_bytes()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "--", "train.py", *flags, "--run", str(run), "--heads", "all"]
    agent = subprocess.Popen(
        [*command, "--epochs", "100000", "--validate", "last", "--lr", "0.01"], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in agent.stdout:
        if line.startswith("epoch 1/"):
            break
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    start = time.time()
    os.kill(int(workers[1]), signal.SIGKILL)
    _, error = agent.communicate(timeout=60)
    assert agent.returncode != 0 and time.time() - start < 30
    assert error.count("error: another process ended before its work was done") <= 1
    for pid in map(int, workers):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (run / "offsets.safetensors").read_bytes() == before
    assert not list(run.glob("*.partial"))
