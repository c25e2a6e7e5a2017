"""From texts to the tensors of one forward pass, and which examples go together."""

from dataclasses import dataclass
from itertools import takewhile

import torch

from lofit.errors import InputError
from lofit.llm.context import KVCache, Tree
from lofit.llm.model import TokenIndex
from lofit.llm.tokenizer import Tokenizer

IGNORE = -100  # label of a token that is not in the loss
POOL = 16  # batches that are sorted by length together
Encoded = tuple[list[int], list[int]]  # ids and labels of one text


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right, and which tokens of which texts are to be predicted.

    Padding is any id: under a causal mask no real token sees it.
    """

    ids: torch.Tensor  # [B, T] int64
    lengths: list[int]  # of each row, without padding
    source: TokenIndex  # the N positions that predict a labelled token
    target: torch.Tensor  # [N] that token
    text: torch.Tensor  # [N] the text it belongs to
    n_texts: int
    tree: Tree | None = None  # None: one text a row


def encode_example(tokenizer: Tokenizer, prompt: str, answer: str, end: bool = True) -> Encoded:
    """prompt + answer (+ the tokenizer's end_id) -> (ids, labels); labels are the ids of answer and
    end, IGNORE before."""
    ids, n_prompt = tokenizer.encode_pair(prompt, answer)
    if end:
        ids = [*ids, tokenizer.end_id]
    return ids, [IGNORE] * n_prompt + ids[n_prompt:]


def collate(texts: list[Encoded], device: str | torch.device) -> Batch:
    """One text a row."""
    found = [
        (row, t - 1, label, row)
        for row, (_, labels) in enumerate(texts)
        for t, label in enumerate(labels)
        if label != IGNORE
    ]
    return _batch([ids for ids, _ in texts], found, len(texts), device)


def pack(
    groups: list[list[Encoded]], device: str | torch.device, prefix: KVCache | None = None
) -> Batch:
    """One group of texts a row: the tokens that they begin with once, as the trunk of a `Tree`,
    then the rest of each text as a branch. Texts are numbered through all groups.

    prefix: keys and values of the tokens that all texts of all groups begin with; these are left
    out of the rows. No label may be among them, nor directly after them.
    """
    start = 0 if prefix is None else prefix.k.shape[3]
    rows, places, branches, found, n_texts = [], [], [], [], 0
    for group in groups:
        trunk = common_prefix_length([ids for ids, _ in group])
        row, place = group[0][0][start:trunk], list(range(start, trunk))
        branch = [0] * len(row)
        for number, (ids, labels) in enumerate(group, 1):
            shift = len(row) - trunk  # from a position after the trunk to its column
            for t, label in enumerate(labels):
                if label != IGNORE:
                    column = t - 1 - start if t <= trunk else t - 1 + shift
                    found.append((len(rows), column, label, n_texts))
            row, place = row + ids[trunk:], place + list(range(trunk, len(ids)))
            branch += [number] * (len(ids) - trunk)
            n_texts += 1
        rows.append(row), places.append(place), branches.append(branch)
    tree = Tree(_padded(places, device), _padded(branches, device), prefix)
    return _batch(rows, found, n_texts, device, tree)


def common_prefix_length(texts: list[list[int]]) -> int:
    """How many tokens all texts begin with."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def draw_batches(
    lengths: list[int], batch_size: int, generator: torch.Generator, by_length: bool = True
) -> list[list[int]]:
    """One epoch: every example once, in batches drawn by the generator.

    by_length: examples of like length go together, so that little is padded; else they follow the
    drawn order, as in the paper's code. A smaller batch holds the rest.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if by_length:
        size = POOL * batch_size
        pools = (order[i : i + size] for i in range(0, len(order), size))
        order = [row for pool in pools for row in sorted(pool, key=lengths.__getitem__)]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if not by_length:
        return batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def check_length(lengths: list[int], limit: int, what: str, limit_of: str | None = None) -> None:
    """Raise InputError if a sequence is longer than a limit, by default the model's positions.
    limit_of: whose limit it is, for the error."""
    if max(lengths) > limit:
        limit_of = limit_of or "the model's (max_position_embeddings); shorten it"
        raise InputError(
            f"{what}: example {lengths.index(max(lengths))} has {max(lengths)} tokens; the limit of"
            f" {limit} is {limit_of}"
        )


def _batch(
    rows: list[list[int]],
    found: list[tuple[int, int, int, int]],
    n_texts: int,
    device: str | torch.device,
    tree: Tree | None = None,
) -> Batch:
    row, column, target, text = torch.tensor(found, device=device).T
    lengths = [len(ids) for ids in rows]
    return Batch(_padded(rows, device), lengths, (row, column), target, text, n_texts, tree)


def _padded(rows: list[list[int]], device: str | torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
