"""A run that is stopped goes on: the same command ends with the same bytes."""

import json
import random
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from conftest import MINI, random_model

import eval as eval_script
import select_heads
import train
from lofit import objectives, resume
from lofit.llm import generate, scoring
from lofit.llm.checkpoint import save_model

FAST = ["--epochs", "3", "--lr", "0.05", "--batch-size", "2"]


class Killed(BaseException):
    """As SIGKILL: nobody handles it."""


@pytest.fixture
def flags(tiny_config, small_data, tmp_path):
    config = replace(tiny_config, max_position_embeddings=512)
    save_model(random_model(config), tmp_path / "tiny", torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, tmp_path / "tiny" / name)
    return ["--model", str(tmp_path / "tiny"), "--data", str(small_data)]


@pytest.fixture
def kill(monkeypatch):
    """kill(n): the n-th forward pass of training or evaluation from now on does not come back."""
    left = [0]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(objectives, "target_losses", counted(objectives.target_losses))
    monkeypatch.setattr(scoring, "target_losses", counted(scoring.target_losses))
    monkeypatch.setattr(generate, "generate", counted(generate.generate))

    def set_to(n: int) -> None:
        left[0] = n

    return set_to


def contents(run):
    """Bytes of every file but the log, and the log's steps and epochs without their times."""
    files = {p.relative_to(run): p for p in sorted(run.rglob("*")) if p.is_file()}
    found = {name: p.read_bytes() for name, p in files.items() if name.name != "log.jsonl"}
    for name, path in files.items():
        if name.name == "log.jsonl":
            records = [json.loads(line) for line in path.open()]
            steps = [r for r in records if "epoch" in r]
            found[name] = [{k: v for k, v in r.items() if k != "time"} for r in steps]
    return found


@pytest.mark.parametrize("task", ["mquake", "clutrr", "truthfulqa"])
def test_killed_at_random_steps_it_ends_with_the_same_bytes(
    flags, tmp_path, kill, monkeypatch, capsys, task
):
    steps = [
        (select_heads, [*FAST, "--heads", "3"]), (train, FAST), (eval_script, ["--batch-size", "4"])
    ]  # fmt: skip
    draw, kills, run = random.Random(task), 0, tmp_path / "run"
    for name in ("whole", "killed"):
        for script, extra in steps:
            argv = [*flags, "--task", task, "--run", str(run), *extra]
            for left in (3, 2, 1, 0) if name == "killed" else (0,):
                monkeypatch.setattr(resume, "SHARE", draw.choice([1e9, 1e-9]))
                kill(draw.randint(1, 7) if left else 0)
                with suppress(Killed):
                    script.main(argv)
                    break
                kills += 1
        run.rename(tmp_path / name)
    print(f"{kills} kills")
    assert kills >= 7
    assert "going on behind step" in capsys.readouterr().out
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
