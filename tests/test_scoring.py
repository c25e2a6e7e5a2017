"""Scores of given answers: what is shared by texts is computed once and changes nothing."""

import pytest
import torch
from conftest import MINI

from lofit.heads import attach_offsets
from lofit.scoring import score_answers, shared_prefix
from lofit.tokenizer import load_tokenizer

# one question and answers that begin alike: the texts share more than what may be left out
ALONE = [
    ("Q: What is the capital of Braviland? A:", [" the city.", " the city of.", " the.", " is."])
]
MANY = [
    *ALONE,
    ("Q: What is the sport? A:", [" city."]),
    ("Q: Who is it? A:", [" of.", " the of."]),
]


@pytest.mark.parametrize("asked", [ALONE, MANY, [("?", [" the.", " of."])]])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_fast_way_agrees_with_the_plain_one(tiny, asked, batch_size):
    tokenizer = load_tokenizer(MINI)
    attach_offsets(tiny, [(0, 1), (2, 3)], torch.ones(2, 8))
    want = score_answers(tiny, tokenizer, asked, 2, "", plain=True)
    found = score_answers(tiny, tokenizer, asked, batch_size, "")
    assert list(map(len, found)) == [len(answers) for _, answers in asked]
    for one, other in zip(found, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_texts_that_share_nothing_have_no_prefix(tiny):
    assert shared_prefix(tiny, [([1, 2, 3], [-100, -100, 3]), ([4, 2], [-100, 2])]) is None
    assert shared_prefix(tiny, [([1, 2], [-100, 2]), ([1, 3], [-100, 3])]) is None  # predicts
