"""ListOps: its values and depths against the published file's, limits, and the cheap rule."""

import json
import re
from collections import Counter

import pytest
from conftest import SHARED

from data import listops
from lofit.errors import InputError
from lofit.tasks.own import own_task


@pytest.mark.parametrize(
    ("expression", "value", "depth"),
    [
        ("7", 7, 0), ("[MIN 4 2 9 ]", 2, 1), ("[MAX 4 [MIN 8 9 ] 1 ]", 8, 2),
        ("[MED 2 3 ]", 2, 1),  # 2.5, cut and not rounded up
        ("[MED 9 1 4 ]", 4, 1), ("[SM 9 9 9 ]", 7, 1), ("( ( ( ( [MAX 1 ) 7 ) 2 ) ] )", 7, 1),
        *((text, None, None) for text in (
            "", "1 2", "[MIN ]", "[MIN 1", "1 ]", "[AVG 1 2 ]", "12", "[MIN 1 ] ]", "x")),
    ],
)  # fmt: skip
def test_values(expression, value, depth):
    if value is None:
        with pytest.raises(ValueError):
            listops.evaluate(expression)
    else:
        assert listops.evaluate(expression) == (value, depth)


def test_the_published_values():
    path = SHARED / "datasets" / "tasks" / "listops" / "test_d20s.tsv"
    if not path.is_file():
        pytest.skip("the published file is not on this machine")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    found = [(int(value), listops.evaluate(expression)) for value, expression in lines]
    assert len(found) == 10_000 and all(value == own for value, (own, _) in found)
    depths = Counter(depth for _, (_, depth) in found)
    assert (round(depths[1] / 100), round(depths[2] / 100), round(depths[3] / 100)) == (21, 23, 14)
    assert depths[0] == 1 and max(depths) <= 20


SMALL = ["--pool", "2000"]


def test_the_task(tmp_path):
    listops.main(["--out", str(tmp_path), *SMALL])
    task, splits = own_task(tmp_path), {}
    for split, n in (("train", 300), ("val", 100), ("test", 500)):
        splits[split] = task.read(task.file(tmp_path, split), split, 42)
        assert len(splits[split]) == n
        for example in splits[split]:
            expression = example.prompt.split("Expression: ")[1].removesuffix("\nValue:")
            symbols = expression.split()
            assert 4 <= len(symbols) <= 30 and symbols[0] in listops.OPERATIONS
            value, _ = listops.evaluate(expression)
            assert example.answer == f" {value}" and f"[{example.group}" == symbols[0]
            ((_, rule),) = example.rules
            if not re.search(r"\[", expression[1:]) and example.group in ("MIN", "MAX"):
                assert rule == example.answer  # the rule knows all that there is
    prompts = [example.prompt for split in splits.values() for example in split]
    assert len(set(prompts)) == 900
    operations = Counter(re.findall(r"\[[A-Z]+", " ".join(prompts)))
    assert set(operations) == set(listops.OPERATIONS)


def test_no_split_has_the_long_ones():
    """Short expressions are drawn early; the items are a sample of all."""
    lines = listops.make(900, seed=42, depth=1, symbols=5, pool=4000)
    shortest = [len(line["prompt"].split("[")[1].split()) == 5 for line in lines]
    early, late = sum(shortest[:450]), sum(shortest[450:])
    assert abs(early - late) < 0.2 * (early + late)


@pytest.mark.slow
def test_depths_are_those_of_the_published_files():
    """test_d20s.tsv has 30, 34, 21 and 10 % of depth 1 to 4 among its expressions of at most 30
    symbols; a small pool has more of the short ones."""

    def shares(pool: int) -> list[float]:
        lines = listops.make(700, 42, 20, 30, pool)
        texts = (x["prompt"].partition("Expression: ")[2].removesuffix("\nValue:") for x in lines)
        depths = Counter(listops.evaluate(text)[1] for text in texts)
        return [100 * depths[depth] / 700 for depth in (1, 2, 3, 4)]

    # 5 points: three standard errors of a share of 700
    assert shares(100_000) == pytest.approx([30.4, 34.0, 20.5, 10.4], abs=5)
    assert shares(1000)[0] > 40


def test_the_cheap_rule():
    def line(expression: str, value: int) -> dict:
        operation = expression.split()[0][1:]
        prompt = listops.PROMPT.format(expression)
        return {"prompt": prompt, "answer": f" {value}", "group": operation}

    train = [line("[SM 1 2 ]", 3), line("[SM 1 2 0 ]", 3), line("[SM 1 1 ]", 2)]
    test = [line("[MIN 4 [MAX 1 2 ] 3 ]", 2), line("[SM 9 9 ]", 8), line("[MED 1 ]", 1)]
    listops.add_rule({"train": train, "test": test})
    assert [x.get("rule") for x in test] == [" 3", " 3", None]  # no MED in train: no answer


def test_seed_and_limits(tmp_path):
    def texts(*flags):
        listops.main(["--out", str(tmp_path), *SMALL, *flags])
        return [(tmp_path / f"{s}.jsonl").read_text() for s in ("train", "val", "test")]

    first = texts()
    assert texts() == first and texts("--seed", "1") != first
    flags = ("--depth", "1", "--symbols", "4", "--train", "100", "--val", "20", "--test", "30")
    shallow = [json.loads(line) for line in "".join(texts(*flags)).splitlines()]
    assert len(shallow) == 150 and all(x["prompt"].count("[") == 1 for x in shallow)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--symbols 3", "--symbols 3: 0 of 2000 different expressions of --depth 20 are as short"),
        ("--symbols 4", r"are as short; expected 900"),  # there are 4 x 100
    ],
)  # fmt: skip
def test_bad_limits(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        listops.main(["--out", str(tmp_path), *SMALL, *flags.split()])
    assert not list(tmp_path.iterdir())
