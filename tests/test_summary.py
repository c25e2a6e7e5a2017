"""The head map, the interval and the table."""

import sys

import pytest
import torch

from lofit.run.summary import (
    by_answer,
    by_group,
    head_map,
    paired_bootstrap,
    results_table,
    save_picture,
)
from lofit.tasks import Example, find_tasks

(TASK,) = find_tasks("boolq")
SCORES = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.0, 0.9]])


def test_head_map_has_the_last_layer_on_top():
    lines = head_map(SCORES, [(0, 1), (1, 2)]).splitlines()
    assert lines[:2] == ["layer   1 |.   #| 1", "layer   0 |  # -| 1"] and "head 0 .. 2" in lines[2]
    assert "#" in head_map(torch.zeros(1, 2), [(0, 0)])


def test_head_map_as_a_picture_and_no_old_one_without_matplotlib(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason='needs pip install -e ".[plot]"')
    path = tmp_path / "heads.png"
    assert save_picture(path, SCORES, [(0, 1)], "title") == ", heads.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert save_picture(path, SCORES, [(0, 1)], "title") == "" and not path.exists()


def test_bootstrap_interval_is_the_textbooks():
    """200 items, 60 gained and 20 lost: mean 0.2, standard error 0.0424."""
    base, tuned = [0.0] * 180 + [1.0] * 20, [1.0] * 60 + [0.0] * 140
    low, high = paired_bootstrap(base, tuned)
    error = ((60 + 20) / 200 - 0.2**2) ** 0.5 / 200**0.5
    assert (low, high) == pytest.approx((0.2 - 1.96 * error, 0.2 + 1.96 * error), abs=0.006)
    assert paired_bootstrap(base, base) == (0, 0)
    assert paired_bootstrap(base, tuned) == (low, high)  # seeded


def test_bootstrap_draws_what_items_share():
    """A hundred items of four units, all of one unit gained or none: it is as if there were four.
    Where all share one unit nothing is known of how units vary, and items are drawn."""
    base, tuned = [0.0] * 100, [1.0] * 25 + [0.0] * 75
    apart = paired_bootstrap(base, tuned)
    units = [str(i // 25) for i in range(100)]
    of_four = paired_bootstrap([0.0] * 4, [1.0, 0.0, 0.0, 0.0])
    assert paired_bootstrap(base, tuned, units) == of_four and of_four[1] > 1.5 * apart[1]
    assert paired_bootstrap(base, tuned, ["one"] * 100) == apart


def test_results_table():
    differences = {"em": {"value": 0.75, "ci95": [0.7, 0.8]}}
    differences["old_answer"] = {"value": -0.5, "ci95": [-0.6, -0.4]}
    scores = {"base": {"em": 0.125, "old_answer": 0.5}, "tuned": {"em": 0.875, "old_answer": 0.0}}
    table = results_table({"scores": scores, "differences": {"tuned": differences}}).splitlines()
    assert table[1].split() == ["em", "12.5%", "87.5%", "+75.0", "[+70.0,", "+80.0]"]
    assert table[2].split() == ["old_answer", "50.0%", "0.0%", "-50.0", "[-60.0,", "-40.0]"]
    alone = results_table({"scores": {"base": scores["base"]}}).splitlines()
    assert alone[1].split() == ["em", "12.5%"]


def by(examples, base, task=TASK):
    """by_answer's (most frequent answer, its share, how often each was given)."""
    rows = [{"prediction": x} if isinstance(x, str) else {"log_probs": x} for x in base]
    found = by_answer(task, examples, {"base": rows})
    return found and (*found["always"].values(), found["given"]["base"])


def test_by_answer_counts_what_was_generated_or_is_most_probable():
    options = {"right": (" true",), "wrong": (" false",)}
    examples = [Example("Q:", " true", references=(" true",), **options)] * 3
    found = by(examples, ["true", "so false, not true", "untold"])
    assert found == ("true", 1, {"false": 1, "true": 1, "other": 1})
    numbers = [Example("Q:", f" {n} + 0 = {n}", value=n) for n in (1200, 1200, 3.0)]
    found = by(numbers, ["1,200.0", "0 and 3", "none"])
    assert found == ("1200", 2 / 3, {"1200": 1, "3": 1, "other": 1})
    choices = [Example("Q:", right, right=(right,), wrong=wrong)
               for right, wrong in ((" a", (" b", " c")), (" b", (" a", " c")))]  # fmt: skip
    found = by(choices, [{"right": [-2.0], "wrong": wrong} for wrong in ([-3, -1], [-1, -3])])
    assert found[1:] == (0.5, {"a": 1, "b": 0, "c": 1, "other": 0})


def test_by_answer_of_texts_leaves_case_out_and_skips_free_answers():
    examples = [Example("Q:", f" Word{i % 20}", references=("x",)) for i in range(40)]
    given = by(examples, ["word3"] * 39 + ["none of them"])[2]
    assert (given["Word3"], given["other"], sum(given.values())) == (39, 1, 40)
    assert by([*examples, Example("Q:", "another", references=("x",))], ["word3"] * 41) == {}


def test_by_group():
    examples = [Example("Q:", "a", group=f"depth {d}") for d in (10, 9, 9)]
    scored = {"base": [{"em": em} for em in (0.0, 1.0, 0.0)]}
    groups = by_group(examples, scored, ("em",))["groups"]
    assert list(groups.items()) == [
        ("depth 9", {"n": 2, "base": {"em": 0.5}}), ("depth 10", {"n": 1, "base": {"em": 0}})
    ]  # fmt: skip
    assert by_group([Example("Q:", "a")], {"base": scored["base"][:1]}, ("em",)) == {}
