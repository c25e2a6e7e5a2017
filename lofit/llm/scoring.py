"""Log-probabilities of given tokens: cross-entropy, and how multiple-choice tasks are evaluated."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lofit.llm.batches import Batch, collate, encode_example
from lofit.llm.generate import check_finite
from lofit.llm.model import CausalLM
from lofit.llm.tokenizer import Tokenizer

MAX_LOGITS = 2**24  # at once: 64 MB in fp32. Gemma has 256,000 for every token


def target_losses(model: CausalLM, batch: Batch) -> torch.Tensor:
    """-log p of every labelled token of the batch: [N] fp32. Logits are computed where a label is,
    nowhere else: a prompt's are most of them."""
    context, hidden = batch.context(model.config), batch.hidden
    if hidden is None:
        hidden = model.model.lower(batch.layer, batch.ids, context)
    hidden = model.model.upper(batch.layer, hidden, context, at=batch.source)
    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(hidden) <= rows:
        return _cross_entropy(model, hidden, batch.target)
    # in parts, whose logits the backward pass computes again
    parts = zip(hidden.split(rows), batch.target.split(rows), strict=True)
    return torch.cat(
        [
            checkpoint(_cross_entropy, model, h, t, use_reentrant=False, preserve_rng_state=False)
            for h, t in parts
        ]
    )


def _cross_entropy(model: CausalLM, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model.logits(hidden).float(), target, reduction="none")


def sum_by_text(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log p of each labelled token [N] -> log p of the labelled tokens of each text [n_texts]."""
    return -losses.new_zeros(batch.n_texts).index_add(0, batch.text, losses)


@torch.no_grad()
def score_answers(
    model: CausalLM, tokenizer: Tokenizer, asked: list[tuple[str, list[str], bool]],
    batch_size: int, description: str, plain: bool = False,
) -> list[list[float]]:  # fmt: skip
    """log p(answer | question), summed over the answer's tokens, for each answer of each question.

    asked: (question, answers, whether the end of the text counts as a token of the answer). Which
    tokens belong to the answer follows from characters in the joint text (`Tokenizer.encode_pair`).
    What all texts begin with is computed once, each question once (tree.py); with `plain`, each
    answer has a row of its own from its first token on. Questions and answers must fit the model's
    positions.
    """
    groups = [
        [encode_example(tokenizer, question, answer, end) for answer in answers]
        for question, answers, end in asked
    ]
    device = model.lm_head.weight.device
    if not plain:
        from lofit.llm.tree import common_prefix, pack

        prefix = common_prefix(model, [text for group in groups for text in group])
    scores: dict[int, list[float]] = {}
    batches = _batches_of(groups, batch_size)
    for rows in tqdm(batches, description, unit="batch", disable=None, leave=False):
        part = [groups[i] for i in rows]
        batch = collate(sum(part, []), device) if plain else pack(part, device, prefix)
        values = sum_by_text(target_losses(model, batch), batch)
        check_finite(values)
        found = values.split([len(group) for group in part])
        scores |= {i: each.tolist() for i, each in zip(rows, found, strict=True)}
    return [scores[i] for i in range(len(groups))]


def _batches_of(groups: list[list], batch_size: int) -> list[list[int]]:
    """Indices of groups, the short ones first; a batch holds at least batch_size texts."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(groups)), key=lambda i: sum(len(ids) for ids, _ in groups[i])):
        if room <= 0:
            batches.append([])
            room = batch_size
        batches[-1].append(i)
        room -= len(groups[i])
    return batches
