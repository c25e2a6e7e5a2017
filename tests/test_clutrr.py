"""CLUTRR: prompts byte for byte, the sample by seed, and odd predictions."""

import json

import pytest
from conftest import SHARED

from lofit.errors import InputError
from lofit.tasks import clutrr

STORY = {
    "clean_story": "[Ann] asked her son, [Bo], to help. [Bo]'s wife [Cy] came.",
    "query": "('Ann', 'Cy')",
    "target_text": "daughter-in-law",
}
PROMPT = (
    'Read the following story about a family. "Ann asked her son, Bo, to help. Bo\'s wife Cy came."'
    " Assume the relations described in the story are all true. Based on relations between the"
    " fictional characters in the story (assume the relations are all true) and your commonsense"
    " knowledge about family relationship, how is  Cy related to Ann? Answer:  Cy is Ann 's\n"
)


def read(data, split, seed=42):
    return clutrr.read(clutrr.TASK.file(data, split), split, seed)


@pytest.fixture
def write(tmp_path):
    def write(items, split="val"):
        folder = tmp_path / "clutrr"
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps(items))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("continuation", "prediction", "em"),
    [
        ("daughter-in-law", "daughter-in-law", 1), ("", "", 0), (".", "", 0),
        (" Daughter-in-law. And so on", "Daughter-in-law", 1), ("Bo 's\nson", "Bo 's\nson", 0),
        ("son\nRead the", "son\nRead the", 0), ("son\ufffd", "son\ufffd", 0),
    ],
)  # fmt: skip
def test_prompt_and_predictions(write, continuation, prediction, em):
    (example,) = read(write([STORY]), "val")
    assert example.prompt == PROMPT
    assert example.answer == "daughter-in-law" and example.references == ("daughter-in-law",)
    assert clutrr.extract(example, continuation) == prediction
    assert clutrr.score(prediction, example) == {"em": em}


def test_300_stories_are_sampled_by_the_seed(write):
    stories = [STORY | {"target_text": f"relation {i}"} for i in range(320)]
    data = write(stories, "train")

    def answers(seed):
        return [e.answer for e in read(data, "train", seed)]

    assert len(answers(1)) == len(set(answers(1))) == 300
    assert answers(1) == answers(1) != answers(2)
    write(stories)
    assert len(read(data, "val", 1)) == 320


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"a": 1}, "expected a list"),
        ([STORY, 7], "item 1: expected an object"),
        ([STORY, {"query": "('a', 'b')"}], "item 1: not a CLUTRR story.*'clean_story' is missing"),
        ([STORY | {"query": "Ann"}], "item 0: not a CLUTRR story"),
        ([STORY | {"query": "('Ann',)"}], "item 0: not a CLUTRR story"),
        ([STORY | {"query": "("}], "item 0: not a CLUTRR story: .*'query' is '\\('"),
        ([STORY | {"query": "__import__('os')"}], "item 0: not a CLUTRR story"),
        ([STORY | {"target_text": ""}], "item 0: .*expected a text"),
    ],
)
def test_bad_files_are_refused(write, items, message):
    with pytest.raises(InputError, match=f"val.json(, |: ){message}"):
        read(write(items), "val")


def test_the_real_splits():
    if not SHARED.is_dir():
        pytest.skip("the real splits are not on this machine")
    found = {s: read(SHARED / "datasets", s) for s in ("train", "val", "test")}
    assert [len(examples) for examples in found.values()] == [300, 450, 450]
    assert not any("[" in e.prompt or "]" in e.prompt for e in found["test"])
