"""The losses by hand, and in parts."""

import math

import pytest
import torch
from conftest import difference

from lofit import losses
from lofit.batches import IGNORE, collate
from lofit.heads import attach_offsets
from lofit.losses import cross_entropy, dpo_loss, l1_norm, sum_by_text, target_losses

ROWS = [([1, 5, 6, 7, 2], [IGNORE] * 3 + [7, 2]), ([1, 8, 2], [IGNORE] * 2 + [2])]


def test_target_losses_are_those_of_all_logits(tiny):
    """By hand: the logits at every position, the log-probability of what follows."""
    batch = collate(ROWS, "cpu")
    log_p = tiny(batch.ids).log_softmax(-1)
    want = -torch.stack([log_p[0, 2, 7], log_p[0, 3, 2], log_p[1, 1, 2]])
    assert difference(target_losses(tiny, batch), want) < 1e-5
    by_text = sum_by_text(target_losses(tiny, batch), batch)
    assert difference(by_text, -torch.stack([want[0] + want[1], want[2]])) < 1e-5


def test_padding_does_not_change_the_loss(tiny):
    alone = [target_losses(tiny, collate([row], "cpu")) for row in ROWS]
    together = target_losses(tiny, collate(ROWS, "cpu"))
    assert difference(together, torch.cat(alone)) < 1e-5


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
    monkeypatch.setattr(losses, "MAX_LOGITS", 2 * tiny.config.vocab_size)
    found, grad = run()
    assert sizes == [2, 1] * 2 or sizes == [2, 1, 1, 2]  # forward, and again for backward
    assert difference(found, want) < 1e-6 and difference(grad, want_grad) < 1e-6


def test_cross_entropy_by_hand(tiny):
    hidden, weight = torch.zeros(1, 32), tiny.lm_head.weight
    assert cross_entropy(tiny, hidden, torch.tensor([3])).item() == pytest.approx(
        math.log(len(weight))
    )


def test_dpo_loss_by_hand():
    policy = torch.tensor([[-3.0, -1.0], [-5.0, -2.0]])  # chosen, rejected of two pairs
    reference = torch.tensor([[-4.0, -1.0], [-5.0, -4.0]])
    by_hand = [math.log(1 + math.exp(-0.5 * margin)) for margin in (1.0, -2.0)]
    assert dpo_loss(policy, reference, 0.5).item() == pytest.approx(sum(by_hand) / 2)


def test_l1_norm():
    assert l1_norm([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])]).item() == 6
