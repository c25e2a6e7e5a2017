"""Log-probabilities of given tokens: cross-entropy, and how multiple-choice tasks are evaluated."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lofit.llm.batches import (
    Batch,
    Encoded,
    check_length,
    collate,
    common_prefix_length,
    encode_example,
    pack,
)
from lofit.llm.context import KVCache, make_context
from lofit.llm.generate import Memo, check_finite, no_memo
from lofit.llm.model import CausalLM
from lofit.llm.tokenizer import Tokenizer

MAX_LOGITS = 2**24  # at once: 64 MB in fp32. Gemma has 256,000 for every token


def target_losses(
    model: CausalLM, batch: Batch, first: int = 0, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """-log p of every labelled token of the batch: [N] fp32. Logits are computed where a label is,
    nowhere else.

    hidden: [B, T, D] that enter layer `first`, where they are known already.
    """
    context = make_context(model.config, batch.ids, tree=batch.tree)
    hidden = model.model.embed(batch.ids) if hidden is None else hidden
    return cross_entropy(model, model.model.run(hidden, context, first, batch.source), batch.target)


def cross_entropy(model: CausalLM, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p(target) after final hidden states [N, D]: [N] fp32. Beyond MAX_LOGITS in parts, whose
    logits the backward pass computes again."""

    def part(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.logits(h).float(), t, reduction="none")

    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(target) <= rows:
        return part(hidden, target)
    parts = zip(hidden.split(rows), target.split(rows), strict=True)
    return torch.cat(
        [checkpoint(part, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
    )


def sum_by_text(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log p of each labelled token [N] -> log p of the labelled tokens of each text [n_texts]."""
    return -losses.new_zeros(batch.n_texts).index_add(0, batch.text, losses)


@torch.no_grad()
def score_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    asked: list[tuple[str, list[str]]],
    batch_size: int,
    description: str,
    plain: bool = False,
    memo: Memo = no_memo,
) -> list[list[float]]:
    """log p(answer | question), summed over the answer's tokens, for each answer of each question.

    Which tokens belong to the answer follows from characters in the joint text
    (`Tokenizer.encode_pair`). What all texts begin with is computed once, each question once, and
    at least batch_size answers go together; with `plain`, each answer has a row of its own from its
    first token on. Raises InputError if a text exceeds the model's positions.
    """
    groups = [
        [encode_example(tokenizer, question, answer, end=False) for answer in answers]
        for question, answers in asked
    ]
    texts = [text for group in groups for text in group]
    limit = model.config.max_position_embeddings
    check_length([len(ids) for ids, _ in texts], limit, "answers to score")
    device = model.lm_head.weight.device
    if plain:
        groups, prefix = [[text] for text in texts], None
    else:
        prefix = common_prefix(model, texts)

    def log_probs(rows: list[int]) -> list[list[float]]:
        part = [groups[i] for i in rows]
        batch = collate([t for (t,) in part], device) if plain else pack(part, device, prefix)
        values = sum_by_text(target_losses(model, batch), batch)
        check_finite(values)
        found = iter(values.tolist())
        return [[next(found) for _ in group] for group in part]

    scores: dict[int, list[float]] = {}
    batches = batches_of(groups, batch_size)
    for rows in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
        scores |= zip(rows, memo(log_probs, rows), strict=True)
    rest = iter([score for i in range(len(groups)) for score in scores[i]])
    return [[next(rest) for _ in answers] for _, answers in asked]


def common_prefix(model: CausalLM, texts: list[Encoded]) -> KVCache | None:
    """Keys and values of the tokens that all texts begin with; None if there are none. The token
    that predicts a first label stays out of it."""
    first = min(next(t for t, label in enumerate(labels) if label >= 0) for _, labels in texts)
    n = min(common_prefix_length([ids for ids, _ in texts]), first - 1)
    if n < 1:
        return None
    cache = KVCache(model.config, 1, n, model.lm_head.weight)
    model.model(torch.tensor([texts[0][0][:n]], device=model.lm_head.weight.device), cache=cache)
    return cache


def batches_of(groups: list[list[Encoded]], batch_size: int) -> list[list[int]]:
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
