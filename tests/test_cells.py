"""The engine of the studies: what runs once, in which order, and what is told of failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import cells
from lofit.studies.cells import Cell, Step, finish, run_cells

FAKE = """
import pathlib, sys, time
folder, file, text = sys.argv[1:4]
if text == "fail":
    sys.exit("error: no such thing")
if text == "wait":
    print("waiting", flush=True)
    time.sleep(60)
with (pathlib.Path(folder) / file).open("a") as out:
    out.write(text)
"""


@pytest.fixture
def step(tmp_path):
    """(folder name, text) -> a step that writes the text to the folder's file `result`."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def make(name, text="x", file="result"):
        folder = tmp_path / name
        return Step(str(script), (str(folder), file, text), folder, (file,))

    return make


def test_a_step_runs_once_and_a_shared_one_before_those_that_need_it(step, tmp_path, capsys):
    shared = Cell("shared", [step("shared")])
    order = [Cell(name, [step(name)], (shared,)) for name in ("a", "b", "c")]
    last = Cell(
        "last", lambda: [step("last", (tmp_path / "a" / "result").read_text())], (order[0],)
    )
    assert run_cells([*order, last], jobs=3) == []
    for name in ("shared", "a", "b", "c", "last"):
        assert (tmp_path / name / "result").read_text() == "x"
    assert "5 cells, 0 done, 5 to do, 3 at a time" in capsys.readouterr().out
    (tmp_path / "b" / "result").unlink()
    run_cells([*order, last], jobs=1)
    assert "5 cells, 4 done, 1 to do" in capsys.readouterr().out
    assert all((tmp_path / n / "result").read_text() == "x" for n in ("shared", "a", "b", "last"))


def test_a_failure_is_one_line_and_stops_only_what_needs_it(step, tmp_path, capsys):
    bad = Cell("bad", [step("bad", "fail"), step("bad", file="second")])
    after, other = Cell("after", [step("after")], (bad,)), Cell("other", [step("other")])
    failed = run_cells([after, other], jobs=2, device="cpu")
    assert [cell.name for cell in failed] == ["bad", "after"]
    log = tmp_path / "bad" / "output.txt"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("failed: bad: ")
    assert lines[0].endswith(f"fake.py ended with 1: no such thing -> {log}")
    assert lines[1] == "failed: after: what it needs failed"
    assert (tmp_path / "other" / "result").exists()
    assert not (tmp_path / "after").exists() and not (tmp_path / "bad" / "second").exists()
    assert log.read_text().startswith("$ ") and "--device cpu" in log.read_text()
    with pytest.raises(InputError, match="2 cells failed"):
        finish(failed)


def test_other_flags_in_the_same_folder_are_refused_before_anything_runs(step, tmp_path):
    run_cells([Cell("a", [step("a", "one")])])
    with pytest.raises(InputError, match="made by .*choose another --out"):
        run_cells([Cell("b", [step("b")]), Cell("a", [step("a", "two")])])
    assert not (tmp_path / "b").exists()


def test_jobs_share_the_cores_and_none_only_looks(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells.torch, "get_num_threads", lambda: 7)
    seen = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        cells.subprocess,
        "Popen",
        lambda *a, **k: (seen.append(k["env"].get("OMP_NUM_THREADS")), popen(*a, **k))[1],
    )
    run_cells([Cell("a", [step("a")]), Cell("b", [step("b")])], jobs=0)
    assert not seen and "2 cells, 0 done, 2 to do" in capsys.readouterr().out
    run_cells([Cell("a", [step("a")]), Cell("b", [step("b")])], jobs=3)
    assert seen == ["2", "2"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_a_study_ends_its_scripts(step, tmp_path, how):
    waiting = step("waiting", "wait")
    code = (
        "import sys; from pathlib import Path; from lofit import errors\n"
        "from lofit.studies.cells import *\n"
        f"folder = Path({str(waiting.folder)!r})\n"
        f"step = Step({waiting.script!r}, {waiting.args!r}, folder, ('r',))\n"
        "errors.run(lambda: run_cells([Cell('c', [step])]))"
    )
    study = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stderr=subprocess.PIPE)
    log = waiting.folder / "output.txt"
    end = time.time() + 60
    while not (log.exists() and "waiting\n" in log.read_text()):
        assert time.time() < end
        time.sleep(0.1)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(study.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 1
    study.send_signal(how)
    assert study.wait(30) == 128 + how
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)
    assert not (waiting.folder / "cell.json").exists()


def test_the_time_of_what_is_done_foretells_the_rest(step, tmp_path, capsys):
    run_cells([Cell("a", [step("a")])], device="cpu")
    record = json.loads((tmp_path / "a" / "cell.json").read_text())
    (script,) = record
    assert record[script]["device"] == "cpu"
    record[script]["seconds"] = 600
    (tmp_path / "a" / "cell.json").write_text(json.dumps(record))
    capsys.readouterr()
    run_cells([Cell(name, [step(name)]) for name in ("a", "b", "c")], jobs=2)
    assert "2 to do, 2 at a time, about 10 minutes if" in capsys.readouterr().out


def test_two_studies_at_once_run_a_shared_cell_once(step, tmp_path):
    """As the jobs of an array do: who comes second waits, and finds it done."""
    shared = step("shared")
    script = Path(shared.script)
    script.write_text(script.read_text() + "\ntime.sleep(3)\n")
    code = (
        "from pathlib import Path; from lofit.studies.cells import *\n"
        f"folder = Path({str(shared.folder)!r})\n"
        f"step = Step({shared.script!r}, {shared.args!r}, folder, ('result',))\n"
        "assert run_cells([Cell('c', [step])]) == []"
    )
    studies = [subprocess.Popen([sys.executable, "-c", code], cwd=REPO) for _ in range(2)]
    assert [study.wait(120) for study in studies] == [0, 0]
    assert (tmp_path / "shared" / "result").read_text() == "x"


def test_scripts_take_turns_on_the_gpus(step, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    seen, popen = [], subprocess.Popen
    monkeypatch.setattr(
        cells.subprocess,
        "Popen",
        lambda *a, **k: (seen.append(k["env"]["CUDA_VISIBLE_DEVICES"]), popen(*a, **k))[1],
    )
    run_cells([Cell(name, [step(name)]) for name in ("a", "b")], jobs=1)
    assert seen == ["3", "5"]
