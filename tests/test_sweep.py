"""The sweep over seeds and numbers of heads: what it calls, and that its table is the runs'."""

import contextlib
import importlib
import io
import json

import pytest
from conftest import REPO

from lofit import sweep
from lofit.errors import InputError


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
    sweep.main([*flags, "--seeds", "1", "2", "--heads", "5", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6  # title, base, 2 numbers of heads x 2 choices
    for line, (choice, k) in zip(
        printed[2:], [("lofit", 5), ("random", 5), ("lofit", 2), ("random", 2)], strict=True
    ):
        assert line.startswith(f"{choice:7}{k:4} heads")
        runs = [tmp_path / "out" / f"seed{seed}-{choice}-{k}" for seed in (1, 2)]
        results = [json.loads((run / "results.json").read_text()) for run in runs]
        assert [r["seed"] for r in results] == [1, 2]
        assert all(len(r["heads"]) == k for r in results)
        scores = [r["tuned"]["em"] for r in results]
        for score in (*scores, sum(scores) / 2):
            assert f"{score:6.1%}" in line
    selected = json.loads((tmp_path / "out" / "seed1" / "heads.json").read_text())["heads"]
    few = json.loads((tmp_path / "out" / "seed1-lofit-2" / "results.json").read_text())["heads"]
    assert few == selected[:2]
    # one selection a seed serves both numbers of heads
    assert [script for script, *_ in in_process].count("select_heads.py") == 2


def test_a_run_that_fails_is_named_with_its_reason(monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(
        InputError, match=r"eval\.py --model nowhere failed: nowhere: no such model"
    ):
        sweep.call("eval.py", "--model", "nowhere")
