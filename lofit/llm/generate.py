"""Greedy decoding with a key-value cache: prefill, one step, and the loop around them."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from lofit.errors import InputError
from lofit.llm.model import CausalLM, KVCache, make_context

DecodeStep = Callable[[CausalLM, torch.Tensor, torch.Tensor, KVCache], torch.Tensor]


@torch.no_grad()
def prefill(
    model: CausalLM, ids: torch.Tensor, lengths: torch.Tensor, cache: KVCache
) -> torch.Tensor:
    """Run right-padded prompts ids: [B, T] of the given lengths: [B]; fills the cache.

    Returns the logits after each prompt's last token: [B, V].
    """
    last = (torch.arange(len(ids), device=ids.device), lengths - 1)
    context = make_context(model.config, ids, cache=cache)
    return model.logits(model.model(ids, context, at=last))


@torch.no_grad()
def decode_step(
    model: CausalLM, token: torch.Tensor, position: torch.Tensor, cache: KVCache
) -> torch.Tensor:
    """One token a row, token, position: [B] -> logits [B, V].

    A row's position starts at its own prompt length, so the step overwrites the padding's keys, and
    no row ever looks past its own position.
    """
    context = make_context(model.config, token[:, None], position[:, None], cache)
    return model.logits(model.model(token[:, None], context))[:, 0]


class Decoding:
    """How a batch is decoded token by token: its cache, and its step. fast/decoding.py has another
    one for GPUs."""

    def __init__(self, step: DecodeStep = decode_step):
        """step: `decode_step`, or what a compiler made of it."""
        self.step = step

    def new_cache(self, model: CausalLM, rows: int, length: int) -> KVCache:
        """An empty cache for a batch. length: prompt plus new tokens."""
        return KVCache(model, rows, length)


def check_finite(values: torch.Tensor) -> None:
    """InputError if the model computed something that is not a finite number."""
    if not values.isfinite().all():
        name = str(values.dtype).removeprefix("torch.")
        raise InputError(
            f"the model's outputs are not finite ({name}); try --dtype float32 or bfloat16, or"
            " offsets trained with a smaller --lr"
        )


@torch.no_grad()
def generate(
    model: CausalLM, prompts: list[list[int]], max_new_tokens: int, eos_ids: tuple[int, ...],
    stop_ids: frozenset[int] = frozenset(), decoding: Decoding | None = None,
) -> list[list[int]]:  # fmt: skip
    """Greedy continuation of one batch of prompts, each up to and without eos, or up to and with
    one of stop_ids."""
    decoding = decoding or Decoding()
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    cache = decoding.new_cache(model, len(prompts), width + max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    going = set(rows)
    logits = prefill(model, ids, lengths, cache)
    check_finite(logits)
    token = logits.argmax(-1)
    for i in range(max_new_tokens):
        for row, t in zip(rows, token.tolist(), strict=True):
            if row not in going:
                continue
            if t in eos_ids:
                going.remove(row)
                continue
            new[row].append(t)
            if t in stop_ids:
                going.remove(row)
        if not going or i == max_new_tokens - 1:
            break
        # finished rows leave when half are: copies of the cache are few, and so are batch sizes
        if 2 * len(going) <= len(rows):
            stay = [j for j, row in enumerate(rows) if row in going]
            rows = [rows[j] for j in stay]
            token, lengths = token[stay], lengths[stay]
            cache.keep_rows(stay)
        token = decoding.step(model, token, lengths + i, cache).argmax(-1)
    return new


def generate_all(
    model: CausalLM, prompts: list[list[int]], max_new_tokens: int, eos_ids: tuple[int, ...],
    batch_size: int, description: str, stop_ids: frozenset[int] = frozenset(),
    decoding: Decoding | None = None,
) -> list[list[int]]:  # fmt: skip
    """`generate` for any number of prompts, in batches of like length; results in their order.
    Prompts and their continuations must fit the model's positions."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    batches = range(0, len(order), batch_size)
    for start in tqdm(batches, description, unit="batch", disable=None, leave=False):
        rows = order[start : start + batch_size]
        part = [prompts[i] for i in rows]
        found = generate(model, part, max_new_tokens, eos_ids, stop_ids, decoding)
        for i, tokens in zip(rows, found, strict=True):
            results[i] = tokens
    return results
