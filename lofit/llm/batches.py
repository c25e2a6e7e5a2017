"""From texts to the tensors of one forward pass, and which examples go together."""

from dataclasses import dataclass

import torch

from lofit.errors import InputError
from lofit.llm.config import ModelConfig
from lofit.llm.model import Context, TokenIndex, make_context
from lofit.llm.tokenizer import Tokenizer

IGNORE = -100  # label of a token that is not in the loss
POOL = 16  # batches that are sorted by length together
Encoded = tuple[list[int], list[int]]  # ids and labels of one text


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right, and which tokens of which texts are to be predicted.

    Padding is any id: under a causal mask no real token sees it. What is known before the pass can
    be added by `dataclasses.replace`, as the wrappers of an objective do (fast/, distributed.py).
    """

    ids: torch.Tensor  # [B, T] int64
    lengths: list[int]  # of each row, without padding
    source: TokenIndex  # the N positions that predict a labelled token
    target: torch.Tensor  # [N] that token
    text: torch.Tensor  # [N] the text it belongs to
    n_texts: int
    tree: object = None  # a tree.Tree of several texts in a row; None: one text a row
    layer: int = 0  # the first layer to compute,
    hidden: torch.Tensor | None = None  # [B, T, D] and what enters it, where that is known
    reference: torch.Tensor | None = None  # [2, pairs] of DPO
    weight: torch.Tensor | None = None  # [N] 0 for targets that are padding (fast/graphs.py)

    def context(self, config: ModelConfig) -> Context:
        return self.tree.context(config) if self.tree else make_context(config, self.ids)


def encode_example(tokenizer: Tokenizer, prompt: str, answer: str, end: bool = True) -> Encoded:
    """prompt + answer (+ the tokenizer's end_id) -> (ids, labels); labels are the ids of answer and
    end, IGNORE before: the loss is on the answer alone."""
    ids, n_prompt = tokenizer.encode_pair(prompt, answer)
    if not n_prompt:  # position -1 would predict it
        raise InputError(f"{prompt!r} has no token before its answer; write a longer prompt")
    ids = [*ids, tokenizer.end_id] if end else ids
    return ids, [IGNORE] * n_prompt + ids[n_prompt:]


def collate(texts: list[Encoded], device: str | torch.device) -> Batch:
    """One text a row."""
    found = [
        (row, t - 1, label, row)  # the token at t is predicted at t - 1
        for row, (_, labels) in enumerate(texts)
        for t, label in enumerate(labels)
        if label != IGNORE
    ]
    return make_batch([ids for ids, _ in texts], found, len(texts), device)


def make_batch(rows: list[list[int]], found: list[tuple], n_texts: int, device, tree=None) -> Batch:
    """found: (row, column, target, text) of each labelled token."""
    row, column, target, text = torch.tensor(found, device=device).T
    ids, lengths = padded(rows, device), [len(ids) for ids in rows]
    return Batch(ids, lengths, (row, column), target, text, n_texts, tree)


def padded(rows: list[list[int]], device: str | torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def draw_batches(
    lengths: list[int], batch_size: int, generator: torch.Generator, by_length: bool = True
) -> list[list[int]]:
    """One epoch: every example once, in batches drawn by the generator; a smaller one holds the
    rest. by_length: examples of like length go together, so that little is padded; else they
    follow the drawn order, as in the paper's code."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if by_length:
        size = POOL * batch_size
        pools = (order[i : i + size] for i in range(0, len(order), size))
        order = [row for pool in pools for row in sorted(pool, key=lengths.__getitem__)]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if not by_length:
        return batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def check_length(lengths: list[int], limit: int, names: list[str], whose: str = "") -> None:
    """InputError if a text is too long: cut, it would lose its answer. names: of the texts, or one
    for all of them; whose: the limit is."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > limit:
        name = names[longest] if len(names) > 1 else f"{names[0] if names else 'text'} {longest}"
        raise InputError(
            f"{name}: {lengths[longest]} tokens, more than {whose or 'the model has positions'}"
            f" ({limit}); shorten the text"
        )
