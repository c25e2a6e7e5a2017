"""The sweep over seeds and numbers of heads: what it calls, and that its table is the runs'."""

import contextlib
import importlib
import io
import json

import pytest
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import sweep


@pytest.fixture
def in_process(monkeypatch):
    """The scripts called in this process, which spares five starts of torch; returns the calls."""
    calls = []

    def call(script, *args):
        calls.append((script, *args))
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script.removesuffix(".py")).main(list(args))

    monkeypatch.setattr(sweep, "call", call)
    return calls


def test_the_table_is_what_the_runs_wrote(tiny_folder, small_data, tmp_path, in_process, capsys):
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--out", str(tmp_path / "out")]
    flags += ["--task", "mquake", "truthfulqa", "--seeds", "1", "2", "--heads", "5", "2"]
    sweep.main(flags)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    expected = [(task, k) for task in ("mquake (em)", "truthfulqa (mc1)") for k in (5, 2)]
    (out,) = (tmp_path / "out").iterdir()
    for row, (task, k) in zip(rows, expected, strict=True):
        name, title, base, heads, values, *choices = (c.strip() for c in row.strip("|").split("|"))
        metric = task.split("(")[1].strip(")")
        assert (name, title, heads, values) == (tiny_folder.name, task, str(k), f"{8 * k}")
        for choice, cell in zip(("lofit", "random"), choices, strict=True):
            runs = [out / task.split()[0] / f"seed{seed}-{choice}-{k}" for seed in (1, 2)]
            results = [json.loads((run / "results.json").read_text()) for run in runs]
            assert [r["seed"] for r in results] == [1, 2]
            folds = [r["heads"] if metric == "mc1" else [r["heads"]] for r in results]
            assert all(len(heads) == k for both in folds for heads in both)
            one, two = (r["tuned"][metric] for r in results)
            was = results[0]["base"][metric]
            assert base == f"{was:.1%}"
            points = 100 * ((one + two) / 2 - was)
            assert cell == f"{(one + two) / 2:.1%} ({points:+.1f}): {100 * one:.1f} {100 * two:.1f}"
    selected = json.loads((out / "mquake" / "seed1" / "heads.json").read_text())["heads"]
    few = json.loads((out / "mquake" / "seed1-lofit-2" / "results.json").read_text())["heads"]
    assert few == selected[:2]
    # one selection a task and seed serves both numbers of heads
    assert [script for script, *_ in in_process].count("select_heads.py") == 4


def test_a_run_that_fails_is_named_with_its_reason(monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(
        InputError, match=r"eval\.py --model nowhere failed: nowhere: no such folder"
    ):
        sweep.call("eval.py", "--model", "nowhere")
