"""The pretraining text: no edit of a task's split is in it, and it says what it should."""

import random

import pytest

from data.miniworld import mquake_splits
from data.world import World
from weights.corpus import EARLY, LATE, MIX, Corpus


@pytest.fixture(scope="module")
def corpus():
    return Corpus(World())


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
