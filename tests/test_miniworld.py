"""The shipped task files: what is in them, and what must not be in two of them."""

import csv
import json

import pytest
from conftest import REPO

from data.miniworld import (
    CLUTRR_SIZES,
    MQUAKE_SIZES,
    TRUTHFULQA_HEADER,
    clutrr_splits,
    mquake_splits,
    truthfulqa_folds,
)
from data.world import World
from lofit.tasks import clutrr, mquake, truthfulqa


def read(task, data, split):
    return task.read(task.file(data, split), split, 42)


SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def cases():
    folder = REPO / "data" / "mini" / "MQuAKE"
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()] for split in SPLITS
    }


@pytest.fixture(scope="module")
def world():
    return World()


def edit_of(case):
    rewrite = case["requested_rewrite"][0]
    return rewrite["subject"], rewrite["relation_id"]


def test_the_shipped_cases_are_what_the_script_writes(cases, world):
    assert mquake_splits(world) == cases and mquake_splits(world, seed=1) != cases
    assert {split: len(rows) for split, rows in cases.items()} == MQUAKE_SIZES
    for split, rows in cases.items():
        assert len(read(mquake.TASK, REPO / "data" / "mini", split)) == len(rows)
        targets = [c["requested_rewrite"][0]["target_new"]["str"] for c in rows]
        questions = [c["questions"][0] for c in rows]
        assert len(set(zip(map(edit_of, rows), targets, questions, strict=True))) == len(rows)


@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_no_edit_and_no_question_is_in_two_splits(cases, one, other):
    assert not {edit_of(c) for c in cases[one]} & {edit_of(c) for c in cases[other]}
    asked = [{q for c in cases[split] for q in c["questions"]} for split in (one, other)]
    assert not asked[0] & asked[1]


def test_answers_follow_from_the_world_and_the_edit(cases, world):
    for case in (c for rows in cases.values() for c in rows):
        rewrite = case["requested_rewrite"][0]
        hops = [(hop["question"], hop["answer"]) for hop in case["single_hops"]]
        new = [(hop["question"], hop["answer"]) for hop in case["new_single_hops"]]
        assert case["answer"] == hops[-1][1] and case["new_answer"] == new[-1][1]
        assert case["answer"] != case["new_answer"]
        changed = (rewrite["question"], rewrite["target_new"]["str"])
        assert changed in new and changed not in hops


def test_the_shipped_stories_are_what_the_script_writes(world):
    splits = clutrr_splits(world)
    assert clutrr_splits(world, seed=1) != splits
    for split, size in CLUTRR_SIZES.items():
        path = REPO / "data" / "mini" / "clutrr" / f"{split}.json"
        assert json.loads(path.read_text()) == splits[split] and len(splits[split]) == size
        examples = read(clutrr.TASK, REPO / "data" / "mini", split)
        assert len(examples) == size
    texts = [story["story"] for split in splits.values() for story in split]
    assert len(set(texts)) == len(texts)


def test_the_shipped_questions_are_what_the_script_writes(world):
    folder, asked = REPO / "data" / "mini" / "truthfulqa", {}
    assert truthfulqa_folds(world, seed=1) != truthfulqa_folds(world)
    for name, rows in truthfulqa_folds(world).items():
        with (folder / name).open(newline="") as file:
            assert list(csv.reader(file)) == [TRUTHFULQA_HEADER, *rows]
        asked[name[5:].removesuffix("_seed_42.csv")] = {row[2] for row in rows}
    for fold in (0, 1):
        train, val, test = (asked[f"{fold}_{split}"] for split in ("train", "val", "test"))
        assert not train & val and not (train | val) & test
        assert len(train | val | test) == len(world.myths)
        assert test == asked[f"{1 - fold}_train"] | asked[f"{1 - fold}_val"]
        (first, *_) = read(truthfulqa.FOLDS[fold], REPO / "data" / "mini", "test")
        assert len(first.right) == 1 and len(first.wrong) == 2
