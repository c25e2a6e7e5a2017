"""The synthetic world is consistent, and keeps its edits apart."""

import random

import pytest

from data.tables import CHAINS, FEMALE, KIN, RELATIONS, SIZES
from data.world import World


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
