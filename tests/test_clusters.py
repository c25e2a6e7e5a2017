"""Items that share an edit are recorded, and tables then compare edits."""

import pytest
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import clusters, tables
from lofit.studies.records import Records, Run

DATA = "data/mini"
BASE = Run("base", "weights/mini-llama", "mquake", DATA, 42, "float32")


def record(folder, n: int) -> Records:
    records = Records(folder)
    found = {"n": n, "base": {"em_stripped": 0.0}, "hits": {"em_stripped": n * "0"}}
    records.add(BASE, found | {"seconds": {"eval.py": 1.0}, "device": {}})
    return records


def test_the_base_line_gets_the_edit_of_each_item_and_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    before = record(tmp_path, 400).of(BASE)
    clusters.main(["--model", BASE.model, "--records", str(tmp_path)])
    found = Records(tmp_path).of(BASE)
    assert len(found["clusters"]) == 400 and len({*found["clusters"]}) == 389
    assert found["clusters"][0] == 0 and max(found["clusters"]) == 388
    assert {key: found[key] for key in before} == before


def test_data_of_another_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    record(tmp_path, 300)
    with pytest.raises(InputError, match="400 items, recorded are 300"):
        clusters.main(["--model", BASE.model, "--records", str(tmp_path)])


def test_a_table_compares_groups_where_they_are_recorded(tmp_path):
    records = record(tmp_path, 4)
    run = Run("train", BASE.model, BASE.task, DATA, 42, "float32")
    tuned = {"hits": {"em_stripped": "1100"}, "seconds": {"eval.py": 1.0}, "device": {}}
    records.add(run, tuned)
    assert tables.score(records, [run]) == "50.0% (+50.0 [-41.9, +141.9]°): 50.0"
    records.add(BASE, {"clusters": [0, 0, 1, 1], "seconds": {}, "device": {}})
    assert tables.score(records, [run]) == "50.0% (+50.0 [-585.3, +685.3]°): 50.0"
