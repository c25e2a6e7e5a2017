"""A run that is stopped goes on: the same command ends with the same bytes."""

import json
import random
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MINI, random_model
from lofit.run.artefacts import save_heads, save_offsets, save_results

import eval as eval_script
import select_heads
import train
from lofit import objectives
from lofit.errors import InputError
from lofit.files import as_text
from lofit.llm import generate, scoring
from lofit.llm.checkpoint import save_model
from lofit.run import resume
from lofit.training import Schedule, Training, fit

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


def killed_thrice(script, argv, kill, monkeypatch, draw):
    """Run a script to its end, killed three times if it does not come to it before; how often it
    was."""
    for n in range(4):
        monkeypatch.setattr(resume, "SHARE", draw.choice([1e9, 1e-9]))
        kill(draw.randint(1, 7) if n < 3 else 0)
        with suppress(Killed):
            script.main(argv)
            return n
    raise AssertionError("killed without a kill")


@pytest.mark.slow
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
            if name == "whole":
                script.main(argv)
            else:
                kills += killed_thrice(script, argv, kill, monkeypatch, draw)
        run.rename(tmp_path / name)
    assert kills >= 7  # in all, more than 20
    assert "continuing after step" in capsys.readouterr().out
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        pytest.param(select_heads, ["--by", "gates"], marks=pytest.mark.slow),
        (train, ["--method", "lora"]),
        (train, ["--plain"]),
    ],
)
def test_what_draws_at_each_step_a_baseline_and_the_plain_way(
    flags, tmp_path, kill, monkeypatch, script, extra
):
    run, draw = tmp_path / "run", random.Random(1)
    argv = [*flags, *FAST, "--run", str(run), "--epochs", "2", *extra]
    argv += ["--heads", "random"] if extra == ["--plain"] else []
    script.main(argv)
    run.rename(tmp_path / "whole")
    assert killed_thrice(script, argv, kill, monkeypatch, draw) == 3
    assert contents(tmp_path / "whole") == contents(run)


def test_another_setting_other_data_and_fresh_start_anew(flags, small_data, tmp_path, kill, capsys):
    def stopped(*extra):
        kill(8)
        with pytest.raises(Killed):
            train.main([*argv, *extra])
        return capsys.readouterr().out

    argv = [*flags, *FAST, "--heads", "random", "--run", str(tmp_path / "run")]
    assert "after step" not in stopped()
    assert "continuing after step" in stopped()
    said = stopped("--lr", "0.1")
    assert "starting from the beginning, not from " in said
    assert "train.unfinished: lr was 0.05, is 0.1\n" in said
    path = small_data / "MQuAKE" / "train.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]))
    assert "train.unfinished: examples was " in stopped("--lr", "0.1")
    said = stopped("--lr", "0.1", "--fresh")
    assert "beginning" not in said and "continuing" not in said
    state = tmp_path / "run" / "train.unfinished"
    state.write_bytes(state.read_bytes()[:100])
    assert "not a whole safetensors file" in stopped("--lr", "0.1")


class Objective:
    """The loss x^2; says which batches it was asked for, and which to compute into its cache."""

    lengths = [1] * 10

    def __init__(self):
        self.x, self.batches, self.cached = torch.nn.Parameter(torch.ones(1)), [], []
        self.fill_cache = self.cached.append

    def loss(self, rows):
        self.batches.append(rows)
        return (self.x * self.x).sum()


def test_the_cache_is_filled_again_in_the_batches_of_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SHARE", 1e9)

    def run(stop_at=None):
        objective = Objective()
        schedule = Schedule(lr=0.1, epochs=2, batch_size=3)
        training = Training([objective.x], objective, schedule, 0)
        state = resume.TrainingState(tmp_path / "state", {"script": "x"}, tmp_path / "log.jsonl")
        state.restore(training)

        def on_step(training, record):
            state(training, record)
            if record["step"] == stop_at:
                raise Killed

        with suppress(Killed):
            list(fit(training, on_step))
        return objective

    whole = run()
    (tmp_path / "state").unlink()
    run(stop_at=6)
    rest = run()
    assert rest.batches == whole.batches[6:] and rest.cached == whole.batches[:4]
    assert torch.equal(rest.x, whole.x)


def test_an_interrupt_writes_the_state_after_the_last_whole_step(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SHARE", 1e-9)
    objective = Objective()
    training = Training([objective.x], objective, Schedule(lr=0.1, epochs=2, batch_size=3), 0)
    state = resume.TrainingState(tmp_path / "state", {"script": "x"}, tmp_path / "log.jsonl")
    for _ in zip(range(1), fit(training, state), strict=False):  # one epoch, 4 steps
        pass
    after = objective.x.detach().clone()
    with torch.no_grad():
        objective.x.add_(7)  # a step that was half done
    state.write()
    again = Training([objective.x], objective, Schedule(lr=0.1, epochs=2, batch_size=3), 0)
    state.restore(again)
    assert torch.equal(objective.x, after) and len(again.losses) == 4


def test_a_state_that_cannot_be_written_does_not_end_a_run(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise InputError("train.unfinished: cannot be written (No space left on device)")

    monkeypatch.setattr(resume, "write_tensors", full)
    monkeypatch.setattr(resume, "SHARE", 1e9)
    train.main([*flags, *FAST, "--heads", "random", "--run", str(tmp_path / "run")])
    assert capsys.readouterr().err.count("No space left") == 1
    assert (tmp_path / "run" / "offsets.safetensors").exists()


def test_a_kill_between_two_files_of_a_set_leaves_none_of_two_runs(tmp_path, monkeypatch):
    """heads.json, offsets.safetensors and results.json are there with all that belongs to them."""

    def write(n):
        save_heads(tmp_path / "heads.json", [(0, n)], torch.ones(1, 2), {}, as_text(str(n)))
        save_offsets(tmp_path / "offsets.safetensors", [(0, n)], torch.ones(1, 2), {"n": n})
        save_results(tmp_path, {"n": n, "fold": None}, [{"n": n}])

    def killed_at(patch, call):
        calls = iter(range(100))
        for name in ("replace", "unlink"):
            whole = getattr(Path, name)

            def counted(self, *args, whole=whole, **kwargs):
                if next(calls) == call:
                    raise Killed
                return whole(self, *args, **kwargs)

            patch.setattr(Path, name, counted)

    def found():
        told = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".partial"}
        return [{n: told[n] for n in names if n in told} for names in sets]

    sets = [("heads.json", "heads.png"), ("offsets.safetensors", "lofit_config.json"),
            ("results.json", "predictions.jsonl")]  # fmt: skip
    write(1)
    new = found()
    stopped = 0
    for call in range(20):
        write(0)
        old = found()
        with monkeypatch.context() as patch, suppress(Killed):
            killed_at(patch, call)
            write(1)
            stopped -= 1
        stopped += 1
        for now, before, after, names in zip(found(), old, new, sets, strict=True):
            assert now in (before, after) or names[0] not in now
    assert stopped == 15  # each renames two files, takes one away, and clears two
