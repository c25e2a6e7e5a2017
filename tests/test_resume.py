"""A run that is stopped goes on after its last whole epoch: the same command ends with the same
bytes."""

import json
from pathlib import Path

import pytest
from conftest import MINI

import select_heads
import train
from lofit.objectives import CrossEntropy, Preference
from lofit.run.files import save_results

FAST = ["--epochs", "3", "--lr", "0.05", "--batch-size", "2"]


class Killed(BaseException):
    """As SIGKILL: nobody handles it."""


@pytest.fixture
def kill(monkeypatch):
    """kill(n): the n-th loss from now on does not come back."""
    left = [0]

    def counted(loss):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return loss(*args)

        return call

    for kind in (CrossEntropy, Preference):
        monkeypatch.setattr(kind, "loss", counted(kind.loss))

    def set_to(n: int) -> None:
        left[0] = n

    return set_to


def contents(run):
    """Bytes of every file but those of the process itself."""
    skipped = ("log.jsonl", ".lock")
    return {p.name: p.read_bytes() for p in sorted(run.iterdir()) if p.name not in skipped}


def killed(script, argv, kill, capsys, *steps: int) -> None:
    """Run a script to its end, killed at these of its losses; it continues each time."""
    for n in steps:
        kill(n)
        with pytest.raises(Killed):
            script.main(argv)
    kill(0)
    capsys.readouterr()
    script.main(argv)
    assert "continuing after epoch" in capsys.readouterr().out


def test_with_the_hidden_cache_in_use(small_data, tmp_path, kill, capsys):
    """Heads in layers 4 to 7, so what enters layer 4 is kept: it carries the rounding of the first
    epoch's batches, and a continued run goes through these once more. Killed in epoch 2."""
    own = tmp_path / "own.json"
    own.write_text("[[7, 5], [4, 1], [6, 2], [5, 7]]")
    argv = ["--model", str(MINI), "--data", str(small_data), "--dtype", "float32"]
    argv += ["--n-train", "10", "--epochs", "2", "--batch-size", "5", "--heads", str(own)]
    train.main([*argv, "--run", str(tmp_path / "whole")])
    # 2 batches an epoch, and the validation has 1 more
    killed(train, [*argv, "--run", str(tmp_path / "killed")], kill, capsys, 4)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        (select_heads, ["--heads", "3"]),
        (train, ["--heads", "random", "--plain", "--keep", "best"]),
        (train, ["--method", "lora"]),
        pytest.param(train, ["--heads", "all", "--task", "truthfulqa-0"], marks=pytest.mark.slow),
        pytest.param(select_heads, ["--task", "truthfulqa-1"], marks=pytest.mark.slow),
    ],
)
def test_killed_in_every_epoch_it_ends_with_the_same_bytes(
    flags, tmp_path, kill, capsys, script, extra
):
    argv = [*flags, *FAST, *extra, "--n-train", "6"]
    script.main([*argv, "--run", str(tmp_path / "whole")])
    killed(script, [*argv, "--run", str(tmp_path / "killed")], kill, capsys, 2, 6, 3, 5)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_other_settings_other_data_and_a_damaged_state_start_anew(
    flags, small_data, tmp_path, kill, capsys
):
    argv = [*flags, *FAST, "--heads", "random", "--run", str(tmp_path / "run")]

    def stopped(*extra, n=14):  # 12 batches and the validation: in epoch 2
        kill(n)
        with pytest.raises(Killed):
            train.main([*argv, *extra])
        return capsys.readouterr().out

    assert "after epoch" not in stopped()
    assert "continuing after epoch 1" in stopped(n=1)
    assert "train.unfinished: it is of other settings, data or heads" in stopped("--lr", "0.1")
    assert "continuing after epoch 1" in stopped("--lr", "0.1", n=1)
    assert "it is of other settings" in stopped("--lr", "0.1", "--accumulate", "2")
    for split in ("train", "val"):
        path = small_data / "MQuAKE" / f"{split}.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[::-1]))
        assert "it is of other settings, data or heads" in stopped("--lr", "0.1")
    state = tmp_path / "run" / "train.unfinished"
    for damaged in (state.read_bytes()[:100], b"", b"abc"):
        state.write_bytes(damaged)
        said = stopped("--lr", "0.1", n=1)
        assert "train.unfinished: it is damaged" in said and "weights_only" not in said


def test_results_and_predictions_are_of_one_evaluation_wherever_it_is_killed(tmp_path, monkeypatch):
    """Where results.json is, predictions.jsonl is of the same evaluation."""

    def write(n):
        save_results(tmp_path, "", {"n": n}, [{"n": n}])

    stopped = 0
    for call in range(20):
        write(0)
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                whole = getattr(Path, name)

                def counted(self, *args, whole=whole, call=call, calls=calls, **how):
                    if next(calls) == call:
                        raise Killed
                    return whole(self, *args, **how)

                patch.setattr(Path, name, counted)
            try:
                write(1)
            except Killed:
                stopped += 1
        if (tmp_path / "results.json").exists():
            told = [json.loads((tmp_path / name).read_text())
                    for name in ("results.json", "predictions.jsonl")]  # fmt: skip
            assert told[0] == told[1]
    assert stopped == 3  # one takes a file away, two rename one
