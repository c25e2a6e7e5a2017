"""The runner of the studies and the records: processes, failures, signals, two studies at once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import runner
from lofit.studies.records import Records, Run, pack, unpack
from lofit.studies.runner import Call, run_missing

RUN = Run("select", "m/tiny", "mquake", "data", 1, "float32", by="scales")
FAKE = """
import json, pathlib, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(args["--run"])
if args["--by"] == "wait":
    print("waiting", flush=True)
    time.sleep(60)
if args["--by"] == "fail":
    sys.exit("error: no such thing")
with (folder / "calls").open("a") as calls:
    print(args["--seed"], file=calls)
time.sleep(float(args.get("--slow", 0)))
found = {"fingerprint": "f", "settings": {"lr": 1.0}, "heads": [[0, 1]], "scores": [[0.5, 1.5]]}
(folder / "heads.json").write_text(json.dumps(found))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A select_heads.py that writes two heads' scores; calls run in tmp_path."""
    (tmp_path / "select_heads.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    return Records(tmp_path / "records")


def missing(records, *ways, seeds=(1,), flags=""):
    """As a study asks: the calls that are not recorded."""
    runs = [Run("select", "m/tiny", "mquake", "data", seed, "float32", by=way, select=flags)
            for way in ways for seed in seeds]  # fmt: skip

    def ask():
        return [Call(r, "select_heads.py") for r in runs if not records.done(r, "select_heads.py")]

    return ask


def test_a_call_is_made_once_and_recorded_on_one_line(fake, capsys):
    ask = missing(fake, "gradient", "gates", seeds=(1, 2))
    assert run_missing(ask, fake, jobs=3, device="cpu") == 0 and ask() == []
    lines = [json.loads(line) for line in (fake.folder / "tiny.jsonl").open()]
    assert sorted((line["by"], line["seed"]) for line in lines) == [
        ("gates", 1), ("gates", 2), ("gradient", 1), ("gradient", 2),
    ]  # fmt: skip
    for line in lines:
        assert line["heads"] == [[0, 1]] and line["device"] == {"select_heads.py": "cpu"}
        assert line["seconds"]["select_heads.py"] > 0 and "scores" not in line
    one = Records(fake.folder)
    run = Run("select", "m/tiny", "mquake", "data", 2, "float32", by="gates")
    assert one.grids(run) == [[[0.5, 1.5]]] and one.of(run)["settings"] == {"lr": 1.0}
    assert "4 calls are not recorded" in capsys.readouterr().out
    assert run_missing(ask, fake, jobs=1, device="cpu") == 0
    assert len(list(Path("runs/studies").rglob("calls"))) == 4
    more = missing(fake, "gates", seeds=(3,))
    run_missing(more, fake, jobs=0, device="cpu")
    assert capsys.readouterr().out == "1 calls are not recorded\n" and len(more()) == 1
    run_missing(more, fake, jobs=1, device="cpu")
    assert "1 calls are not recorded: about 0 minutes" in capsys.readouterr().out


def test_a_failure_is_one_line_and_the_others_go_on(fake, capsys):
    ask = missing(fake, "fail", "gradient")
    assert run_missing(ask, fake, jobs=1, device="cpu") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: select_heads.py select mquake data 1 float32 fail: ")
    assert "select_heads.py ended with 1: no such thing -> runs/studies/" in line
    assert [call.run.by for call in ask()] == ["fail"]
    log = next(path for path in Path("runs/studies").rglob("output.txt") if "fail" in str(path))
    assert log.read_text().startswith("$ ") and "--device cpu" in log.read_text()


def test_jobs_share_the_cores_and_take_turns_on_the_gpus(fake, monkeypatch):
    monkeypatch.setattr(runner.torch, "get_num_threads", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    seen, popen = [], subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda *a, **k: (seen.append(k["env"]), popen(*a, **k))[1]
    )
    run_missing(missing(fake, "gates", seeds=(1, 2)), fake, jobs=1, device="auto")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["3", "5"]
    run_missing(missing(fake, "gradient", seeds=(1, 2)), fake, jobs=3, device="cpu")
    assert [env["OMP_NUM_THREADS"] for env in seen[2:]] == ["2", "2"]


STUDY = """
import sys
sys.path[:0] = {paths}
from pathlib import Path
import test_runner
from lofit import errors
from lofit.studies.records import Records
records = Records(Path("records"))
ask = test_runner.missing(records, {ways}, seeds={seeds}, flags={flags!r})
errors.run(lambda: test_runner.run_missing(ask, records, 2, "cpu"))
"""


def study(ways, seeds=(1,), flags="", **more) -> subprocess.Popen:
    paths = [str(REPO), str(REPO / "tests")]
    code = STUDY.format(paths=paths, ways=ways, seeds=seeds, flags=flags)
    return subprocess.Popen([sys.executable, "-c", code], **more)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_scripts_too_and_records_nothing(fake, how):
    started = study("'wait'", stderr=subprocess.PIPE)
    end = time.time() + 60
    while not any("waiting\n" in p.read_text() for p in Path("runs").rglob("output.txt")):
        assert time.time() < end
        time.sleep(0.1)
    ps = ["ps", "-o", "pid=", "--ppid", str(started.pid)]
    (child,) = subprocess.run(ps, capture_output=True, text=True).stdout.split()
    started.send_signal(how)
    assert started.wait(30) == 128 + how
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)
    assert not (fake.folder / "tiny.jsonl").exists()


@pytest.mark.slow
def test_two_studies_at_once_make_a_shared_run_once_and_lose_no_line(fake):
    """As the jobs of an array do: the second one waits, and finds it made."""
    both = [study("'gates'", seeds, "--slow 2") for seeds in ((1, 2, 3), (1, 4, 5))]
    assert [started.wait(120) for started in both] == [0, 0]
    lines = [json.loads(line) for line in (fake.folder / "tiny.jsonl").open()]
    assert sorted(line["seed"] for line in lines) == [1, 2, 3, 4, 5]
    made = [path.read_text().split() for path in Path("runs/studies").rglob("calls")]
    assert sorted(made) == [["1"], ["2"], ["3"], ["4"], ["5"]]


def test_a_second_script_adds_to_the_line_of_its_run(tmp_path):
    records = Records(tmp_path)
    run = Run("train", "m/tiny", "mquake", "data", 1, "float32", "lofit", "scales", "3%")
    for script, found in (("train.py", {"val": {"em": 0.5}}), ("eval.py", {"hits": {"em": "01"}})):
        made = {"seconds": {script: 1.0}, "device": {script: "cpu"}}
        records.add(run, found | made)
    (line,) = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert json.loads(line)["seconds"] == {"train.py": 1.0, "eval.py": 1.0}
    assert records.of(run)["val"] == {"em": 0.5} and records.done(run, "eval.py")
    assert Records(tmp_path).of(run) == records.of(run)


def test_hits_are_digits_where_they_are_0_or_1():
    assert pack([0.0, 1.0, 1.0]) == "011" and unpack("011") == [0, 1, 1]
    assert pack([0.0, 0.33333]) == [0.0, 0.3333] and unpack([0.5, 1]) == [0.5, 1.0]


def test_a_line_that_is_no_run_is_named(tmp_path):
    (tmp_path / "tiny.jsonl").write_text('{"kind": "train", "model": "m/tiny"}\n')
    with pytest.raises(InputError, match="tiny.jsonl, line 1: not a recorded run"):
        Records(tmp_path).of(RUN)
    (tmp_path / "tiny.scores.json.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="tiny.scores.json.gz: not readable .*restore it"):
        Records(tmp_path).grids(RUN)


def test_flags_of_one_step_and_of_the_other_have_folders_of_their_own():
    run = Run("train", "m/tiny", "mquake", "data", 1, "float32", "lofit", "scales", "3%")
    more = [{"select": "--epochs 5"}, {"train": "--epochs 5"}, {"heads_of": "--epochs 5"}]
    folders = {Call(replace(run, **fields), "train.py").folder for fields in ({}, *more)}
    assert len(folders) == 4


def test_a_test_of_other_offsets_than_the_recorded_is_refused(tmp_path):
    """As after a training that was made again on another machine."""
    records = Records(tmp_path)
    run = Run("train", "m/tiny", "mquake", "data", 1, "float32", "lofit", "scales", "3%")
    records.add(run, {"offsets_hash": "a1", "seconds": {"train.py": 1.0}, "device": {}})
    made = runner._Runner(records, 1, "cpu")
    for kind, tested in (("train", ""), ("asked", "clutrr")):
        tested_run = replace(run, kind=kind, tested=tested)
        made._check_offsets(tested_run, {"offsets_hash": "a1"})
        made._check_offsets(tested_run, {"offsets_hash": ["a1", "a1"]})  # in folds
        with pytest.raises(InputError, match="not those of the recorded training"):
            made._check_offsets(tested_run, {"offsets_hash": "b2"})
