"""The records: what a line keeps, and that no process loses what another one adds."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import REPO

from lofit.errors import InputError
from lofit.files import append, write_json, write_jsonl
from lofit.studies import records as module
from lofit.studies.cells import folder_of
from lofit.studies.records import Records, Run, pack, spent, unpack

RUN = Run("select", "m/tiny", "mquake", "data", 1, "float32", by="scales")
TRAINED = Run("train", "m/tiny", "mquake", "data", 1, "float32", "lofit", "scales", "3%")
MADE = {"seconds": 1.0, "device": "cpu"}
ADD = """
import sys
from dataclasses import replace
from pathlib import Path
from lofit.studies.records import Records, Run
for seed in range(int(sys.argv[1]), int(sys.argv[1]) + 20):
    run = Run("select", "m/tiny", "mquake", "data", seed, "float32", by="scales")
    made = {"select_heads.py": {"seconds": 1.0, "device": "cpu"}}
    Records(Path("records")).add(run, made, [[[float(seed)]]])
"""


@pytest.mark.slow
def test_two_processes_lose_no_line(tmp_path):
    command = [sys.executable, "-c", ADD]
    more = {"cwd": tmp_path, "env": {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}}
    both = [subprocess.Popen([*command, first], **more) for first in ("100", "200")]
    assert [process.wait(120) for process in both] == [0, 0]
    records = Records(tmp_path / "records")
    seeds = {run.seed for run in records.of_model("m/tiny")}
    assert seeds == {*range(100, 120), *range(200, 220)} and len(records.grids("m/tiny")) == 40


def test_a_selection_s_folder_is_recorded_once(tmp_path, capsys):
    folder = tmp_path / "run"
    heads = {"fingerprint": "f", "data_hash": "d", "settings": {"lr": 1.0, "by": "scales"}}
    write_json(folder / "heads.json", heads | {"heads": [[0, 1]], "scores": [[0.5, 1.5]]})
    write_json(folder / "cell.json", RUN.as_dict())
    append(folder / "log.jsonl", {"script": "select_heads", "time": time.time(), "device": "cpu"})
    call = [str(folder), "--records", str(tmp_path / "records")]
    module.main(call)
    (line,) = (tmp_path / "records" / "tiny.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["settings"] == {"lr": 1.0} and found["device"] == {"select_heads.py": "cpu"}
    assert found["heads"] == [[0, 1]] and found["data_hash"] == "d" and "scores" not in found
    records = Records(tmp_path / "records")
    assert records.grids(RUN.model)[RUN.title] == [[[0.5, 1.5]]]
    write_json(folder / "heads.json", heads | {"heads": [[0, 0]], "scores": [[1.5, 0.5]]})
    module.main(call)  # made again: the record stays
    assert (tmp_path / "records" / "tiny.jsonl").read_text() == f"{line}\n"
    assert Records(records.folder).grids(RUN.model)[RUN.title] == [[[0.5, 1.5]]]
    other = replace(RUN, model="n/tiny")  # of the same file name
    write_json(folder / "cell.json", other.as_dict())
    module.main(call)
    grids = [Records(records.folder).grids(run.model)[run.title] for run in (RUN, other)]
    assert grids == [[[[0.5, 1.5]]], [[[1.5, 0.5]]]]
    (folder / "heads.json").unlink()
    with pytest.raises(InputError, match="nothing is in it to record"):
        module.main(call)


def test_what_items_share_has_one_number_in_both_folds(tmp_path):
    """Of the base model alone: it is the same for every model."""
    base, tuned = (replace(TRAINED, task="truthfulqa", kind=kind) for kind in ("base", "train"))
    for fold, units in (("truthfulqa-0", "ab"), ("truthfulqa-1", "bcb")):
        folder = tmp_path / fold
        rows = [{"unit": u, "base": {"mc1": 0.0}, "tuned": {"mc1": 1.0}} for u in units]
        folder.mkdir()
        append(folder / "log.jsonl", {"script": "eval", "time": time.time(), "device": "cpu"})
        for name, whos in (("-base", ["base"]), ("", ["base", "tuned"])):
            scores = {who: {"mc1": 0.0} for who in whos}
            adapters = {"tuned": {"trained_values": 8, "offsets_hash": "a1"}}
            results = {"n": len(units), "scores": scores, "adapters": adapters}
            write_json(folder / f"results{name}.json", results)
            write_jsonl(folder / f"predictions{name}.jsonl", rows)
    found = module.measured(base, tmp_path)[0]["eval.py"]
    assert found["clusters"] == [0, 1, 1, 2, 1] and found["n"] == [2, 3]
    for name in ("results-base.json", "predictions-base.jsonl"):
        for fold in ("truthfulqa-0", "truthfulqa-1"):
            (tmp_path / fold / name).unlink()
    found = module.measured(tuned, tmp_path)[0]["eval.py"]
    assert found["hits"] == {"mc1": "11111"} and "clusters" not in found


def test_seconds_leave_out_the_time_after_a_kill(tmp_path):
    now = (tmp_path / "heads.json").touch() or (tmp_path / "heads.json").stat().st_mtime
    for at, more in ((-100, {"device": "gpu"}), (-95, {}), (-20, {"device": "gpu"}), (-18, {})):
        append(tmp_path / "log.jsonl", {"script": "select_heads", "time": now + at} | more)
    append(tmp_path / "log.jsonl", {"script": "train", "time": now, "device": "cpu"})
    found, device = spent(tmp_path / "heads.json", "select_heads")
    assert found == pytest.approx(5 + 2 + 18, abs=1e-3) and device == "gpu"


def test_a_second_script_adds_to_the_line_of_its_run(tmp_path):
    assert pack([0.0, 1.0, 1.0]) == "011" and unpack("011") == [0, 1, 1]  # digits if 0 or 1
    assert pack([0.0, 0.33333]) == [0.0, 0.3333] and unpack([0.5, 1]) == [0.5, 1.0]
    records, run = Records(tmp_path), TRAINED
    for script, found in (("train.py", {"val": {"em": 0.5}}), ("eval.py", {"hits": {"em": "01"}})):
        records.add(run, {script: found | MADE}, [])
    (line,) = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert json.loads(line)["seconds"] == {"train.py": 1.0, "eval.py": 1.0}
    assert records.of(run)["val"] == {"em": 0.5} and records.done(run, "eval.py")
    assert Records(tmp_path).of(run) == records.of(run)


def test_flags_of_one_step_and_of_the_other_have_folders_of_their_own():
    run = TRAINED
    more = [{"select": "--epochs 5"}, {"train": "--epochs 5"}, {"heads_of": "--epochs 5"}]
    folders = {folder_of(replace(run, **fields)) for fields in ({}, *more)}
    assert len(folders) == 4


def test_a_test_of_other_offsets_than_the_recorded_is_refused(tmp_path):
    """As after a training that was made again on another machine."""
    records, run = Records(tmp_path), TRAINED
    records.add(run, {"train.py": MADE | {"offsets_hash": ["a1", "c3"]}}, [])
    # of both folds; or of one, on another task
    for kind, tested, same in (("train", "", ["a1", "c3"]), ("asked", "clutrr", "a1")):
        tested_run = replace(run, kind=kind, tested=tested)
        records.add(tested_run, {"eval.py": MADE | {"offsets_hash": same}}, [])
        with pytest.raises(InputError, match="not those of the recorded training"):
            records.add(tested_run, {"eval.py": MADE | {"offsets_hash": "b2"}}, [])
