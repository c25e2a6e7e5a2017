"""The MQuAKE task byte for byte: the paper's prompt, its prediction, its metric."""

import json
from unicodedata import normalize

import pytest
from conftest import SHARED

from lofit.errors import InputError
from lofit.tasks import Example, mquake

REWRITE = {
    "prompt": "{} is a citizen of", "subject": "John Krasinski",
    "target_new": {"str": "Sweden"}, "target_true": {"str": "United States of America"},
}  # fmt: skip
CASE = {
    "requested_rewrite": [REWRITE],
    "questions": ["Which country is the spouse of Emily Blunt a citizen of?", "2?", "3?"],
    "answer": "United States of America", "answer_alias": ["USA"],
    "new_answer": "Sweden", "new_answer_alias": ["Kingdom of Sweden"],
}  # fmt: skip
PROMPT = (
    "Q: Imagine that John Krasinski is a citizen of Sweden."
    " Which country is the spouse of Emily Blunt a citizen of? A:"
)


def read(data, split="train"):
    return mquake.read(mquake.TASK.file(data, split), split, 42)


@pytest.fixture
def write(tmp_path):
    (tmp_path / "MQuAKE").mkdir()

    def write(*lines):
        text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
        (tmp_path / "MQuAKE" / "train.jsonl").write_text(text)
        return tmp_path

    return write


def test_prompt_and_references(write):
    (example,) = read(write(CASE))
    assert example.prompt == PROMPT
    assert example.answer == "Sweden"
    assert example.references == ("Sweden", "Kingdom of Sweden")
    assert example.outdated == ("United States of America", "USA")


@pytest.mark.parametrize(
    ("continuation", "prediction"),
    [("Sweden\nQ: more", "Sweden"), (" Sweden", " Sweden"), ("", ""),
     ("a A: b", " b")],  # after the *last* A:
)  # fmt: skip
def test_extract(continuation, prediction):
    assert mquake.extract(Example(PROMPT, ""), continuation) == prediction


@pytest.mark.parametrize(
    ("prediction", "em", "stripped", "old"),
    [
        ("Sweden", 1, 1, 0), ("kingdom OF sweden", 1, 1, 0), ("Sweden.", 0, 0, 0), ("", 0, 0, 0),
        (" Sweden", 0, 1, 0),  # the public code does not strip
        (" usa ", 0, 0, 1),
        # accents in two spellings
        (normalize("NFD", "Curaçao"), 1, 1, 0), (normalize("NFD", "Réunion"), 0, 0, 1),
    ],
)  # fmt: skip
def test_score(write, prediction, em, stripped, old):
    more = {"answer_alias": ["USA", "Réunion"]}
    more["new_answer_alias"] = ["Kingdom of Sweden", "Curaçao"]
    (example,) = read(write(CASE | more))
    want = {"em": em, "em_stripped": stripped, "old_answer": old}
    assert mquake.score(prediction, example) == want


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"requested_rewrite": []}, "malformed: list index out of range"),
        ({"questions": [None]}, "expected a text, found None"),
        ({"new_answer": None}, "expected a text, found None"),
        ({"new_answer": ""}, "expected a text, found ''"),
        ({"answer_alias": "USA"}, "malformed"),
        ({"new_answer_alias": ...}, "key 'new_answer_alias' is missing"),
    ],
)
def test_a_malformed_case_is_named(write, spoil, message):
    case = {k: v for k, v in (CASE | spoil).items() if v is not ...}
    with pytest.raises(InputError, match=f"train.jsonl, line 2: not a MQuAKE case: .*{message}"):
        read(write(CASE, case))


@pytest.mark.parametrize(("split", "n"), [("train", 134), ("val", 95), ("test", 864)])
def test_the_real_splits(split, n):
    data = SHARED / "datasets"
    if not (data / "MQuAKE").is_dir():
        pytest.skip("the paper's MQuAKE splits (../shared/datasets) are not on this machine")
    examples = read(data, split)
    assert len(examples) == n
    assert all(e.prompt.count("{}") == 0 and e.prompt.endswith(" A:") for e in examples)


def test_training_texts_are_the_papers(recordings):
    """Its first 48 training texts, from its data file through our reader."""
    data = SHARED / "datasets"
    texts = json.loads((recordings / "select_heads_sft_noresize.json").read_text())["texts"]
    ours = {e.prompt + e.answer for e in read(data)}
    assert {text.removesuffix("</s>") for text in texts} <= ours
