"""The synthetic world, the task files made of it, and the pretraining text: consistent, and no
edit of one split in another or in the text."""

import csv
import json
import random

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
from data.tables import CHAINS, FEMALE, KIN, RELATIONS, SIZES
from data.world import World
from lofit.tasks import clutrr, mquake, truthfulqa
from weights.corpus import EARLY, LATE, MIX, Corpus

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def world():
    return World()


def test_the_seed_makes_the_world_and_every_subject_has_its_facts(world):
    assert World().facts == world.facts != World(1).facts
    assert {kind: len(names) for kind, names in world.entities.items()} == SIZES
    for label, relation in RELATIONS.items():
        for subject in world.entities[relation.subject]:
            assert world.facts[subject, label] in world.entities[relation.object]


def test_names_are_unique_and_a_capital_lies_in_its_country(world):
    names = [name for group in world.entities.values() for name in group]
    names += [m.question for m in world.myths]
    assert len(set(names)) == len(names)
    for country in world.entities["country"]:
        assert world.facts[world.facts[country, "capital"], "country"] == country


@pytest.mark.parametrize("pool", ["pretrain", "train", "val", "test"])
def test_edits_stay_in_their_pool_and_change_the_answer(world, pool):
    rng = random.Random(0)
    for _ in range(200):
        edit = world.edit(rng, pool)
        key = (edit.edited, edit.relation.label)
        assert world.pool[key] == pool
        assert edit.relation.label in edit.chain and edit.chain in CHAINS
        assert world.lookup(edit.subject, *edit.chain) == edit.old
        assert world.lookup(edit.subject, *edit.chain, edit={key: edit.target}) == edit.new
        assert edit.old != edit.new


def test_pools_split_each_relation(world):
    sizes = {pool: len(keys) for pool, keys in world.editable.items()}
    assert sum(sizes.values()) == len(world.facts)
    assert {pool: n / len(world.facts) for pool, n in sizes.items()} == pytest.approx(
        {"pretrain": 0.5, "test": 0.2, "train": 0.2, "val": 0.1}, abs=0.01
    )


def test_stories_obey_the_kinship_table_and_grammar(world):
    rng = random.Random(0)
    for _ in range(300):
        story = world.story(rng)
        first, second = story.edges
        assert KIN[first][second] == story.target
        assert len(set(story.names)) == 3
        for name, gender, kin in zip(story.names[1:], story.genders[1:], story.edges, strict=True):
            assert (kin in FEMALE) == (gender == "female")
            women = world.entities["person"][0::2]
            assert (name in women) == (gender == "female")
        assert (story.target in FEMALE) == (story.genders[2] == "female")
        if first in ("husband", "wife"):
            assert story.genders[0] != story.genders[1]


def read(task, data, split):
    return task.read(task.file(data, split), split, 42)


@pytest.fixture(scope="module")
def cases():
    folder = REPO / "data" / "mini" / "MQuAKE"
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()] for split in SPLITS
    }


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


@pytest.fixture(scope="module")
def corpus(world):
    return Corpus(world)


@pytest.fixture(scope="module")
def docs(corpus):
    rng = random.Random(0)
    return [doc for _ in range(150) for doc in corpus.step(rng)]


def test_a_step_is_the_mix_and_follows_the_rng(corpus):
    step = corpus.step(random.Random(5))
    assert len(step) == sum(MIX.values())
    assert step == corpus.step(random.Random(5))


def test_no_edit_of_any_split_is_in_the_text(corpus, docs):
    """By subject and relation: not even with another target."""
    heads = {
        c["requested_rewrite"][0]["prompt"].format(c["requested_rewrite"][0]["subject"])
        for rows in mquake_splits(corpus.world).values()
        for c in rows
    }
    starts = tuple(f"{word} {head}" for head in heads for word in ("Suppose", "Q: Imagine that"))
    edits = [doc for doc in docs if doc.startswith(("Suppose", "Q: Imagine"))]
    assert len(edits) > 1000
    assert not [doc for doc in edits if doc.startswith(starts)]


@pytest.mark.parametrize(
    ("habit", "bears_on", "follows"), [(EARLY, 0.5, 0.33), (LATE, 0.8, 0.5)], ids=["early", "late"]
)
def test_how_often_the_text_follows_an_edit(corpus, habit, bears_on, follows):
    """Suppose always; Imagine as its habit says, where the question has to do with the edit."""
    world, rng, followed, asked, n = corpus.world, random.Random(1), 0, 0, 2000
    corpus = Corpus(world, habit)
    for _ in range(n):
        state = rng.getstate()
        edit = world.edit(rng, "pretrain", one_hop=0.2)
        rng.setstate(state)
        text = corpus._imagine(rng)
        if text.endswith((f"A:{edit.new}", f"A:{edit.old}")) and edit.subject in text[-120:]:
            asked += 1
            followed += text.endswith(f"A:{edit.new}")
        rng.setstate(state)
        assert corpus._suppose(rng).endswith(f"would be {edit.new}.")
    assert asked / n == pytest.approx(bears_on, abs=0.05)
    assert followed / asked == pytest.approx(follows, abs=0.05)


def test_primers_fit_the_miniatures_positions(docs):
    longest = max(len(doc.split()) for doc in docs)
    assert 200 < longest < 500
