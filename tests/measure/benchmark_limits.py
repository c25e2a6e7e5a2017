"""The least time that the benchmark's work can take: its FLOPs and bytes, and what the machine does
of them in a second.

Rates are measured by many products or copies that follow one another and take 50 ms together: a
single one of 0.2 ms on a GPU gave rates from 77 to 400 TFLOP/s.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from shapes import Ids

from lofit.fast.packed import packed_weights
from lofit.llm.config import ModelConfig
from lofit.objectives import CrossEntropy

if TYPE_CHECKING:  # it loads transformers and peft
    from benchmark_work import Bench

LEAST = 0.05  # seconds of a measured chain
# a chain's weights: more than a GPU's caches hold, or so many
BEYOND_CACHES, MOST_WEIGHTS = 2**26, 32
ROWS = 1024  # tokens of a product
Chain = tuple[Callable[[], object], float]  # what is timed, and its FLOPs or bytes


def seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_flops(config: ModelConfig, tokens: int, pairs: int, targets: int, first: int = 0):
    """FLOPs of the matrix products that no forward pass through layers first, first + 1, ... can
    leave out: o_proj and MLP of the last layer, and lm_head, where a token is predicted.

    pairs: of a token and one that it attends to.
    """
    D, layers = config.hidden_size, config.num_hidden_layers - first
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    into = 2 * tokens * D * (q + 2 * kv) + 4 * q * pairs
    out = 2 * (q * D + 3 * D * config.intermediate_size)
    last = targets * (out + 2 * D * config.vocab_size)
    return layers * into + (layers - 1) * tokens * out + last


def training_flops(config: ModelConfig, lengths: list[int], targets: int, first: int = 0) -> float:
    """The same of a training step: no gradient of weights, and none below the attention's output in
    layer `first`. Backward, attention has four products, the others one each."""
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    forward = forward_flops(config, tokens, pairs, targets, first)
    D, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv, layers = config.num_key_value_heads * config.head_dim, config.num_hidden_layers - first
    return 2 * forward + (layers - 2) * 4 * q * pairs - 2 * tokens * D * (q + 2 * kv)


def limits(bench: "Bench") -> dict[str, Callable[[float, float], float]]:
    """Work -> the least seconds it can take, given FLOP/s and bytes/s of the machine."""
    config, step = bench.config, CrossEntropy(bench.model, Ids(), bench.step, "step")
    rows = CrossEntropy(bench.model, Ids(), bench.examples, "examples").rows
    lengths, targets = [len(ids) for ids, _ in rows], sum(y >= 0 for _, ys in rows for y in ys)

    def training(where: str) -> Callable[[float, float], float]:
        first = min(layer for layer, _ in bench.heads[where])  # what lies below runs once
        tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        below = forward_flops(config, tokens, pairs, 0) - forward_flops(
            config, tokens, pairs, 0, first
        )
        flops = below + bench.epochs * training_flops(config, lengths, targets, first)
        return lambda rate, bandwidth: flops / rate

    def greedy(rate: float, bandwidth: float) -> float:
        n = [len(prompt) for prompt in bench.prompts]
        prompt = forward_flops(config, sum(n), sum(k * (k + 1) // 2 for k in n), 16)
        tokens = [forward_flops(config, 16, sum(n) + 16 * i, 16) for i in range(1, 16)]
        return prompt / rate + sum(max(t / rate, n_bytes / bandwidth) for t in tokens)

    def choices(rate: float, bandwidth: float) -> float:
        shared = bench.shared
        flops = forward_flops(config, shared, shared * (shared + 1) // 2, 0)
        for question, answers in bench.asked:
            own = [len(answer.split()) for answer in answers]
            before, tokens = len(question.split()) - shared, sum(own)
            pairs = sum(k * (shared + before) + k * (k + 1) // 2 for k in [before, *own])
            flops += forward_flops(config, before + tokens, pairs, tokens)
        return flops / rate

    n_bytes = sum(p.nbytes for p in bench.model.parameters()) - bench.model.lm_head.weight.nbytes
    one = training_flops(config, step.lengths, step.weight(list(range(8))))
    return {
        "selection step": lambda rate, bandwidth: one / rate,
        "offsets, upper half": training("upper"),
        "offsets, all layers": training("all"),
        "greedy, 16 x 16 tokens": greedy,
        "choices, 50 questions": choices,
        "decoding step": lambda rate, bandwidth: n_bytes / bandwidth,
    }


def lengthened(work: Callable[[int], object], n: int, device: str) -> tuple[Callable, int]:
    """(a run of n pieces of work, n), n doubled until the run takes LEAST seconds. work: n -> does
    so many pieces."""
    run = partial(work, n)
    run()  # what a first time costs
    while min(seconds(run, device), seconds(run, device)) < LEAST:
        n *= 2
        run = partial(work, n)
    return run, n


@contextmanager
def matrix_products(bench: "Bench", dtype: torch.dtype, packed: bool) -> Iterator[Chain]:
    """A chain of an MLP's products on 1024 tokens, with weights of which each is used once before
    any is used again. Of packed weights the product is faster on a CPU, and evaluation uses it."""
    D, inner = bench.config.hidden_size, bench.config.intermediate_size
    kind = {"device": bench.device, "dtype": dtype}
    x = torch.randn(ROWS, D, **kind)
    n = min(MOST_WEIGHTS, 1 + BEYOND_CACHES // (D * inner * dtype.itemsize))
    linears = torch.nn.ModuleList(torch.nn.Linear(D, inner, bias=False, **kind) for _ in range(n))
    linears.requires_grad_(False)

    def products(n: int) -> None:
        for i in range(n):
            linears[i % len(linears)](x)

    with packed_weights(linears) if packed else nullcontext():
        run, n = lengthened(products, n, bench.device)
        yield run, n * 2 * ROWS * D * inner


def big_copies(device: str) -> Chain:
    """Copies far larger than the caches; bytes are read and written."""
    source = torch.ones(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run, n = lengthened(lambda n: [target.copy_(source) for _ in range(n)], 1, device)
    return run, n * 2 * source.nbytes
