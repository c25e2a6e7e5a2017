"""What the two steps minimise, and the batches they do it on."""

import torch
import torch.nn.functional as F

from lofit.errors import InputError
from lofit.model import CausalLM
from lofit.tokenizer import Tokenizer

IGNORE = -100  # label of a position that is not in the loss
Batch = tuple[torch.Tensor, torch.Tensor]  # ids, labels: [rows, positions] int64


def encode_example(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """prompt + answer + eos -> (ids, labels); labels are ids on answer and eos, IGNORE before."""
    ids, n_prompt = tokenizer.encode_pair(prompt, answer)
    ids = [*ids, tokenizer.eos_ids[0]]
    return ids, [IGNORE] * n_prompt + ids[n_prompt:]


def collate(examples: list[tuple[list[int], list[int]]], device: str) -> Batch:
    """Pad on the right: under a causal mask no real token sees the padding, so any id will do."""
    width = max(len(ids) for ids, _ in examples)
    ids = [ids + [0] * (width - len(ids)) for ids, _ in examples]
    labels = [labels + [IGNORE] * (width - len(labels)) for _, labels in examples]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def answer_cross_entropy(model: CausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens of the batch (not over rows), in fp32.

    Logits are computed where a label is, nowhere else.
    """
    ids, labels = batch
    hidden = model.model(ids)[:, :-1]  # position t predicts token t+1
    target = labels[:, 1:]
    chosen = target != IGNORE
    return F.cross_entropy(model.logits(hidden[chosen]).float(), target[chosen])


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
