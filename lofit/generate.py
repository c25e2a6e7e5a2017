"""Greedy decoding with a key-value cache: prefill, one step, and the loop around them."""

import torch
from tqdm import tqdm

from lofit.errors import InputError
from lofit.model import CausalLM, KVCache


@torch.inference_mode()
def prefill(
    model: CausalLM, ids: torch.Tensor, lengths: torch.Tensor, cache: KVCache
) -> torch.Tensor:
    """Run right-padded prompts ids: [B, T] of the given lengths: [B]; fills the cache.

    Returns the logits after each prompt's last token: [B, V].
    """
    hidden = model.model(ids, cache=cache)
    return model.logits(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])


@torch.inference_mode()
def decode_step(
    model: CausalLM, token: torch.Tensor, position: torch.Tensor, cache: KVCache
) -> torch.Tensor:
    """One token a row, token, position: [B] -> logits [B, V].

    A row's position starts at its own prompt length, so the step overwrites the padding's keys, and
    no row ever looks past its own position.
    """
    return model(token[:, None], position[:, None], cache)[:, 0]


@torch.inference_mode()
def generate(
    model: CausalLM, prompts: list[list[int]], max_new_tokens: int, eos_ids: tuple[int, ...]
) -> list[list[int]]:
    """Greedy continuation of one batch of prompts, each up to and without eos."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, model.lm_head.weight)
    eos = torch.tensor(eos_ids, device=device)
    token = prefill(model, ids, lengths, cache).argmax(-1)
    new = [token]
    done = torch.isin(token, eos)
    for i in range(max_new_tokens - 1):
        if done.all():
            break
        token = decode_step(model, token, lengths + i, cache).argmax(-1)
        new.append(token)
        done |= torch.isin(token, eos)
    rows = torch.stack(new, dim=1).tolist()
    return [row[: next((i for i, t in enumerate(row) if t in eos_ids), len(row))] for row in rows]


def generate_all(
    model: CausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    batch_size: int,
    description: str,
) -> list[list[int]]:
    """`generate` for any number of prompts, in batches of like length; results in their order.

    Raises InputError if a prompt and its continuation exceed the model's positions.
    """
    limit = model.config.max_position_embeddings
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) + max_new_tokens > limit:
        raise InputError(
            f"prompt {longest} has {len(prompts[longest])} tokens; with {max_new_tokens} new ones"
            f" that is more than the model's {limit} positions (max_position_embeddings)"
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    batches = range(0, len(order), batch_size)
    for start in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
        rows = order[start : start + batch_size]
        new = generate(model, [prompts[i] for i in rows], max_new_tokens, eos_ids)
        for i, tokens in zip(rows, new, strict=True):
            results[i] = tokens
    return results
