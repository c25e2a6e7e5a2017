"""What the two steps minimise, beside the cross-entropy that scoring.py has."""

import torch
import torch.nn.functional as F


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean of -log sigmoid(beta * (margin of the policy - margin of the reference)).

    policy, reference: [2, pairs], log-probabilities of chosen and rejected answers (Rafailov et
    al., arXiv 2305.18290, equation 7).
    """
    chosen, rejected = policy - reference
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def l1_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Sum of |A| over all elements of all heads: the penalty of head selection (section 3)."""
    return torch.stack([p.abs().sum() for p in parameters]).sum()


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed elsewhere: apply(loss, gradients, *trained)."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: tuple[torch.Tensor], *trained: torch.Tensor):
        ctx.gradients = [g.view_as(p) for g, p in zip(gradients, trained, strict=True)]
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return None, None, *(upstream * gradient for gradient in ctx.gradients)
