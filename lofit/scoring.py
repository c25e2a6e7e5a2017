"""Log-probabilities of given answers: how multiple-choice tasks are evaluated."""

import torch
from tqdm import tqdm

from lofit.losses import answer_log_probs, check_length, collate, encode_example
from lofit.model import CausalLM
from lofit.tokenizer import Tokenizer


@torch.no_grad()
def score_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    asked: list[tuple[str, list[str]]],
    batch_size: int,
    description: str,
) -> list[list[float]]:
    """log p(answer | question), summed over the answer's tokens, for each answer of each question.

    Which tokens are the answer's is told by characters in the joint text
    (`Tokenizer.encode_pair`). Raises InputError if a text exceeds the model's positions.
    """
    encoded = [
        encode_example(tokenizer, question, answer, end=False)
        for question, answers in asked
        for answer in answers
    ]
    limit = model.config.max_position_embeddings
    check_length([len(ids) for ids, _ in encoded], limit, "answers to score")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    scores = [0.0] * len(encoded)
    device = model.lm_head.weight.device
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=None, leave=False):
        rows = order[start : start + batch_size]
        found = answer_log_probs(model, collate([encoded[i] for i in rows], device))
        for i, score in zip(rows, found.tolist(), strict=True):
            scores[i] = score
    rest = iter(scores)
    return [[next(rest) for _ in answers] for _, answers in asked]
