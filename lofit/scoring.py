"""Log-probabilities of given answers: how multiple-choice tasks are evaluated."""

import torch
from tqdm import tqdm

from lofit.batches import Encoded, check_length, collate, encode_example, n_shared, pack
from lofit.losses import sum_by_text, target_losses
from lofit.model import CausalLM
from lofit.step import KVCache
from lofit.tokenizer import Tokenizer


@torch.no_grad()
def score_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    asked: list[tuple[str, list[str]]],
    batch_size: int,
    description: str,
    plain: bool = False,
) -> list[list[float]]:
    """log p(answer | question), summed over the answer's tokens, for each answer of each question.

    Which tokens are the answer's is told by characters in the joint text
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
        prefix = shared_prefix(model, texts)
    scores: dict[int, list[float]] = {}
    batches = batches_of(groups, batch_size)
    for rows in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
        part = [groups[i] for i in rows]
        batch = collate([t for (t,) in part], device) if plain else pack(part, device, prefix)
        found = iter(sum_by_text(target_losses(model, batch), batch).tolist())
        scores |= {i: [next(found) for _ in groups[i]] for i in rows}
    rest = iter([score for i in range(len(groups)) for score in scores[i]])
    return [[next(rest) for _ in answers] for _, answers in asked]


def shared_prefix(model: CausalLM, texts: list[Encoded]) -> KVCache | None:
    """Keys and values of the tokens that all texts begin with; None if there are none. The token
    that predicts a first label stays out of it."""
    first = min(next(t for t, label in enumerate(labels) if label >= 0) for _, labels in texts)
    n = min(n_shared([ids for ids, _ in texts]), first - 1)
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
