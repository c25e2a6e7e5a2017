"""The map of heads trained alone, and what it says of the ways of choosing."""

import json

import pytest
import torch

from lofit.errors import InputError
from lofit.studies import alone
from lofit.studies.tables import spearman

NAN = float("nan")


def test_rank_correlation_by_hand():
    up = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(up, up**3) == pytest.approx(1)
    assert spearman(up, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
    # two equal values share rank 1.5
    tied = spearman(up, torch.tensor([1.0, 1.0, 2.0, 3.0]))
    assert tied == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def test_what_lies_between_layers():
    assert alone.share_of_layers(torch.tensor([[0.1, 0.1], [0.5, NAN]])) == pytest.approx(1)
    assert alone.share_of_layers(torch.tensor([[0.1, 0.5], [0.1, 0.5]])) == pytest.approx(-0.5)
    assert alone.share_of_layers(torch.tensor([[0.0, 2.0], [3.0, 5.0]])) == pytest.approx(7 / 13)


def test_a_way_that_knows_the_map_and_one_that_does_not():
    found = torch.tensor([[0.9, 0.7, NAN], [0.2, 0.4, 0.3]])
    right = found.nan_to_num(50)  # its first head was not run: the next one counts
    rows = alone.way_rows(found, {"right": [right, right], "wrong": [-right]})
    assert rows[0] == ["right", "1.00", "1.00", "1 1"]
    assert rows[1] == ["wrong", "-1.00", "-1.00", "5"]
    # the other heads of a layer say 0.7, 0.9 and 0.35, 0.25, 0.3
    assert rows[2] == ["layer alone", "0.50", "–", "–"]
    found[1, :2] = NAN  # with one head of a layer the two cannot be told apart
    assert alone.way_rows(found, {"right": [right]}) == [["right", "1.00", "–", "1"]]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    alone.main(["--out", str(tmp_path / "map.png")])
    out = capsys.readouterr().out
    assert "of 128 heads" in out and "| layer alone |" in out
    assert (tmp_path / "map.png").stat().st_size > 5000
    for task, why in (("listops", "no selection of"), ("clutrr", "no clutrr in it")):
        with pytest.raises(InputError, match=why):
            alone.main(["--task", task])


def test_maps_of_two_trainings_are_not_mixed(tmp_path):
    line = {"model": "a/m", "task": "t", "data_hash": "0", "seed": 1, "dtype": "float32", "lr": 0.1}
    line |= {"epochs": 1, "head": None, "score": 0.5}
    for other in ({"lr": 0.2}, {"model": "b/m"}):
        text = "".join(json.dumps(line | more) + "\n" for more in ({}, other))
        (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(InputError, match="t: heads trained in 2 ways"):
            alone.read_map(tmp_path / "m.jsonl", "t", 1, 1)
