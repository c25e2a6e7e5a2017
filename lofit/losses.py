"""What the two steps minimise, and the batches they do it on."""

import torch
import torch.nn.functional as F

from lofit.errors import InputError
from lofit.model import CausalLM
from lofit.tokenizer import Tokenizer

IGNORE = -100  # label of a position that is not in the loss
Encoded = tuple[list[int], list[int]]  # ids and labels of one text
Batch = tuple[torch.Tensor, torch.Tensor]  # ids, labels: [rows, positions] int64


def encode_example(tokenizer: Tokenizer, prompt: str, answer: str, end: bool = True) -> Encoded:
    """prompt + answer (+ eos) -> (ids, labels); labels are ids on answer and eos, IGNORE before."""
    ids, n_prompt = tokenizer.encode_pair(prompt, answer)
    if end:
        ids = [*ids, tokenizer.eos_ids[0]]
    return ids, [IGNORE] * n_prompt + ids[n_prompt:]


def collate(examples: list[Encoded], device: str) -> Batch:
    """Pad on the right: under a causal mask no real token sees the padding, so any id will do."""
    width = max(len(ids) for ids, _ in examples)
    ids = [ids + [0] * (width - len(ids)) for ids, _ in examples]
    labels = [labels + [IGNORE] * (width - len(labels)) for _, labels in examples]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def label_losses(model: CausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of every labelled token of the batch, in fp32, and the row that each is in.

    Logits are computed where a label is, nowhere else.
    """
    ids, labels = batch
    hidden = model.model(ids)[:, :-1]  # position t predicts token t+1
    target = labels[:, 1:]
    chosen = target != IGNORE
    logits = model.logits(hidden[chosen]).float()
    return F.cross_entropy(logits, target[chosen], reduction="none"), chosen.nonzero()[:, 0]


def answer_cross_entropy(model: CausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens of the batch (not over rows)."""
    return label_losses(model, batch)[0].mean()


def answer_log_probs(model: CausalLM, batch: Batch) -> torch.Tensor:
    """log p(labelled tokens | what precedes them), summed over each row: [rows] fp32."""
    losses, row = label_losses(model, batch)
    return -losses.new_zeros(len(batch[0])).index_add(0, row, losses)


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


def check_length(lengths: list[int], max_positions: int, what: str) -> None:
    """Raise InputError if a sequence needs more positions than the model was made for."""
    if max(lengths) > max_positions:
        raise InputError(
            f"{what}: example {lengths.index(max(lengths))} needs {max(lengths)} positions,"
            f" the model has {max_positions} (max_position_embeddings); shorten it"
        )
