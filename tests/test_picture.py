"""The figure of docs/results.md: which recorded runs it shows, and that its command works."""

import re
import sys

import pytest
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import picture
from lofit.studies.records import Records, Run

MODEL = "weights/made-up"
MADE = {"seconds": 1.0, "device": "cpu"}
BASE = Run("base", MODEL, "mquake", "data/real", 42, "float32")
LOFIT = {"kind": "train", "model": MODEL, "task": "mquake", "data": "data/real", "seed": 42}
LOFIT |= {"dtype": "float32", "method": "lofit", "by": "scales", "k": "10%"}


@pytest.fixture
def records(tmp_path) -> Records:
    made = Records(tmp_path)
    made.add(BASE, {"eval.py": {"base": {"em": 0.5, "em_stripped": 0.01}} | MADE}, [])
    return made


def add(records, score, heads=((0, 0), (1, 1)), val=0.5, **run):
    """A run of LoFiT but for the fields given."""
    metric = "mc1" if run.get("task") == "truthfulqa" else "em_stripped"
    found = {"train.py": {"heads": heads, "val": {metric: val}} | MADE}
    if score is not None:
        found["eval.py"] = {"tuned": {metric: score, "em": 0.9}} | MADE
    records.add(Run(**LOFIT | run), found, [])


def shown(records, task="mquake"):
    return picture.read_panel(records, MODEL, task, "data/real", "float32")


def test_each_plain_run_is_one_dot_of_its_way_and_number_of_heads(records):
    add(records, 0.25)
    add(records, 0.5, seed=43)
    add(records, 0.125, by="random", k="3%", heads=[[2, 0]])
    add(records, 0.75, by="all", k="all", heads=[[0, 0], [0, 1], [1, 0], [1, 1]])
    panel = shown(records)
    assert panel.base == 1.0 and panel.lora is None
    assert panel.dots == {
        "scales": {(2, "10%"): [25.0, 50.0]},
        "random": {(1, "3%"): [12.5]},
        "all": {(4, "all"): [75.0]},
    }


@pytest.mark.parametrize(
    "other",
    [
        {"lr_factor": 3.0}, {"heads_of": "clutrr"}, {"train": "--n-train 25"},
        {"train": "--lr 0.03"}, {"select": "--n-train 25"}, {"data": "data/mini"},
        {"dtype": "bfloat16"}, {"quantize": "nf4"}, {"task": "clutrr"}, {"by": "probe"},
        {"method": "red"}, {"kind": "asked", "tested": "clutrr"}, {"seed": 44, "score": None},
    ],
)  # fmt: skip
def test_other_runs_are_no_dots(records, other):
    add(records, 0.25)
    add(records, **{"score": 0.75} | other)
    assert shown(records).dots == {"scales": {(2, "10%"): [25.0]}}


def test_folds_are_one_dot_and_the_bound_of_truthfulqa_is_the_recipe(records):
    folds = [[[0, 0], [1, 1]], [[0, 1], [1, 0]]]
    add(records, 0.25, folds, task="truthfulqa", train="--lr 0.03")
    add(records, 0.75, folds, task="truthfulqa", train="--lr 0.03", by="all", k="all")
    assert shown(records, "truthfulqa").dots == {"scales": {(2, "10%"): [25.0]}}


def test_lora_is_the_mean_of_the_rate_that_did_best_on_validation(records):
    lora = {"method": "lora", "by": "", "k": ""}
    add(records, 0.75, val=0.4, train="--lr 1e-4", **lora)
    add(records, 0.25, val=0.6, train="--lr 5e-4", **lora)
    add(records, 0.5, val=0.6, train="--lr 5e-4", seed=43, **lora)
    add(records, 0.875, val=0.9, train="--n-train 25 --lr 5e-4", **lora)
    panel = shown(records)
    assert panel.lora == 37.5 and panel.dots == {}


def test_the_command_draws_the_runs_of_this_repository(tmp_path):
    pytest.importorskip("matplotlib", reason='needs pip install -e ".[test]"')
    records = Records(REPO / "docs" / "results")
    panel = picture.read_panel(
        records, "weights/gemma-3-270m", "mquake", "data/real", "float32"
    ).dots["random"][2, "3%"]  # fmt: skip
    assert [round(score, 1) for score in panel[:5]] == [34.1, 48.5, 10.8, 44.2, 41.8]
    picture.main(["--out", str(tmp_path / "heads.png"), "--records", str(records.folder)])
    made = (tmp_path / "heads.png").read_bytes()
    assert made.startswith(b"\x89PNG") and len(made) < 80 * 1024
    both = (made, (REPO / "docs" / "heads.png").read_bytes())
    shows = [re.search(rb"Description\0(\w{64})", picture).group(1) for picture in both]
    assert shows[0] == shows[1]  # of the runs that are recorded now


def test_no_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[plot\]"'):
        picture.main(["--out", str(tmp_path / "x.png"), "--records", str(tmp_path)])
