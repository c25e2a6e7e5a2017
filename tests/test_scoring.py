"""Log-probabilities of given tokens: by hand, in parts, and what texts share computed once."""

import pytest
import torch
from conftest import MINI, difference

from lofit.heads import attach_offsets
from lofit.llm import scoring
from lofit.llm.batches import IGNORE, collate
from lofit.llm.scoring import score_answers, sum_by_text, target_losses
from lofit.llm.tokenizer import load_tokenizer
from lofit.llm.tree import common_prefix

# one question and answers that begin alike: the texts share more than what may be left out
ALONE = [
    ("Q: What is the capital of Braviland? A:", [" the city.", " the city of.", " the.", " is."],
     False),
]  # fmt: skip
MANY = [
    *ALONE,
    ("Q: What is the sport? A:", [" city."], False),
    ("Q: Who is it? A:", [" of.", " the of."], True),
]
ROWS = [([1, 5, 6, 7, 2], [IGNORE] * 3 + [7, 2]), ([1, 8, 2], [IGNORE] * 2 + [2])]


def test_target_losses_are_those_of_all_logits(tiny):
    """By hand: the logits at every position, the log-probability of what follows."""
    batch = collate(ROWS, "cpu")
    log_p = tiny(batch.ids).log_softmax(-1)
    want = -torch.stack([log_p[0, 2, 7], log_p[0, 3, 2], log_p[1, 1, 2]])
    assert difference(target_losses(tiny, batch), want) < 1e-5
    by_text = sum_by_text(target_losses(tiny, batch), batch)
    assert difference(by_text, -torch.stack([want[0] + want[1], want[2]])) < 1e-5


def test_many_logits_are_made_in_parts(tiny, monkeypatch):
    """The same losses and gradients, never more logits at once than allowed."""

    def run():
        (v,) = attach_offsets(tiny, [(1, 0)], torch.ones(1, 8))
        found = target_losses(tiny, collate(ROWS, "cpu"))
        found.sum().backward()
        return found.detach(), v.grad

    want, want_grad = run()
    sizes, logits = [], tiny.logits
    monkeypatch.setattr(tiny, "logits", lambda h: sizes.append(len(h)) or logits(h))
    monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * tiny.config.vocab_size)
    found, grad = run()
    assert sizes == [2, 1] * 2 or sizes == [2, 1, 1, 2]  # forward, and again for backward
    assert difference(found, want) < 1e-6 and difference(grad, want_grad) < 1e-6


@pytest.mark.parametrize("asked", [ALONE, MANY, [("?", [" the.", " of."], False)]])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_fast_way_agrees_with_the_plain_one(tiny, asked, batch_size):
    tokenizer = load_tokenizer(MINI)
    attach_offsets(tiny, [(0, 1), (2, 3)], torch.ones(2, 8))
    want = score_answers(tiny, tokenizer, asked, 2, "", plain=True)
    found = score_answers(tiny, tokenizer, asked, batch_size, "")
    assert list(map(len, found)) == [len(answers) for _, answers, _ in asked]
    for one, other in zip(found, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_texts_that_share_nothing_have_no_prefix(tiny):
    assert common_prefix(tiny, [([1, 2, 3], [-100, -100, 3]), ([4, 2], [-100, 2])]) is None
    assert common_prefix(tiny, [([1, 2], [-100, 2]), ([1, 3], [-100, 3])]) is None  # predicts
