"""What the two steps minimise."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lofit.batches import Batch
from lofit.model import CausalLM
from lofit.step import make_step

MAX_LOGITS = 2**24  # at once: 64 MB in fp32. Gemma has 256,000 for every token


def target_losses(
    model: CausalLM, batch: Batch, first: int = 0, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """-log p of every labelled token of the batch: [N] fp32. Logits are computed where a label is,
    nowhere else.

    hidden: [B, T, D] that enter layer `first`, where they are known already.
    """
    step = make_step(model.config, batch.ids, tree=batch.tree)
    hidden = model.model.embed(batch.ids) if hidden is None else hidden
    return cross_entropy(model, model.model.run(hidden, step, first, batch.source), batch.target)


def cross_entropy(model: CausalLM, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p(target) after final hidden states [N, D]: [N] fp32. Beyond MAX_LOGITS in parts, whose
    logits the backward pass computes again."""

    def part(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.logits(h).float(), t, reduction="none")

    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(target) <= rows:
        return part(hidden, target)
    parts = zip(hidden.split(rows), target.split(rows), strict=True)
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in parts])


def sum_by_text(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log p of each labelled token [N] -> log p of the labelled tokens of each text [n_texts]."""
    return -losses.new_zeros(batch.n_texts).index_add(0, batch.text, losses)


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
