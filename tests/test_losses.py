"""The losses by hand."""

import math

import pytest
import torch
from lofit.losses import dpo_loss, l1_norm


def test_dpo_loss_by_hand():
    policy = torch.tensor([[-3.0, -1.0], [-5.0, -2.0]])  # chosen, rejected of two pairs
    reference = torch.tensor([[-4.0, -1.0], [-5.0, -4.0]])
    by_hand = [math.log(1 + math.exp(-0.5 * margin)) for margin in (1.0, -2.0)]
    assert dpo_loss(policy, reference, 0.5).item() == pytest.approx(sum(by_hand) / 2)


def test_l1_norm():
    assert l1_norm([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])]).item() == 6
