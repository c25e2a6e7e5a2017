"""A training step and a decoding step at the shape of a large model: equal or not, and how fast."""

import argparse
import random
import statistics
from functools import partial
from types import SimpleNamespace

import torch
from benchmark_limits import big_copies, matrix_products, seconds, training_flops
from lofit.fast.folded import folded_offsets
from shapes import SHAPES, Ids, random_model, text

from lofit.fast.decoding import GraphedDecoding
from lofit.fast.graphs import GraphedObjective
from lofit.heads import attach_offsets, attach_scales, init_offsets, init_scales
from lofit.llm.checkpoint import DTYPES
from lofit.llm.generate import Decoding, generate
from lofit.llm.model import CausalLM
from lofit.objectives import CrossEntropy
from lofit.training import Schedule, optimizer_for, train_step

# name -> texts, tokens of each, tokens to predict, what is trained
STEPS = {
    "selection, 8 x 128": (8, 128, 8, "scales"),
    "offsets of all layers, 8 x 48": (8, 48, 5, "offsets"),
    "offsets of all layers, 8 x 64": (8, 64, 5, "offsets"),
}


def attach(model: CausalLM, what: str) -> list[torch.Tensor]:
    if what == "scales":
        return attach_scales(model, init_scales(model, 0))
    layers, n = model.config.num_hidden_layers, model.config.num_attention_heads
    return attach_offsets(
        model, [(i, i % n) for i in range(layers)], init_offsets(model, layers, 0)
    )


def sides_of(objective: CrossEntropy, args: argparse.Namespace) -> dict[str, object]:
    """Side -> objective: the plain step, the padded one that a graph replays, the graph; with
    --compile the same of compiled layers."""
    gpu, sides = args.device != "cpu", {"eager": objective}
    for name, compile in (("", False), (", compiled", True))[: 1 + args.compile]:
        sides[f"padded{name}"] = GraphedObjective(objective, capture=False, compile=compile)
        if gpu:
            sides[f"graph{name}"] = GraphedObjective(objective, compile=compile)
    return sides


def gradients(objective, rows: list[int], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss, then the gradients."""
    loss = objective.loss(rows)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def how_far(one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
    if all(torch.equal(a, b) for a, b in zip(one, other, strict=True)):
        return "the same bits"
    flat = [torch.cat([t.double().flatten() for t in tensors[1:]]) for tensors in (one, other)]
    gradient = ((flat[0] - flat[1]).norm() / flat[1].norm()).item()
    return f"loss {abs(one[0] - other[0]) / abs(other[0]):.1e}, gradients {gradient:.1e}, relative"


def steps(args: argparse.Namespace) -> None:
    """Equality first, then times; each as it is found."""
    dtype, rng = DTYPES[args.dtype], random.Random(0)
    model = random_model(SHAPES[args.shape], dtype, args.device)
    vocabulary = model.config.vocab_size
    works = {}
    for name, (B, T, n, what) in STEPS.items():
        if args.only and not any(word in name for word in args.only):
            continue
        lengths = [(T - n - 1, n)] * B
        texts = [(" 1" + text(rng, a, vocabulary), text(rng, b, vocabulary)) for a, b in lengths]
        objective = CrossEntropy(model, Ids(), texts, name)
        works[name] = (objective, what, training_flops(model.config, [T] * B, B * n))
        parameters, sides = attach(model, what), sides_of(objective, args)
        found = {side: gradients(one, [*range(B)], parameters) for side, one in sides.items()}
        for side in [*found][1:]:
            # a graph replays the kernels of the padded step
            other = side.replace("graph", "padded") if "graph" in side else "eager"
            print(
                f"{name}: {side} beside {other}: {how_far(found[side], found[other])}", flush=True
            )
    bench = SimpleNamespace(config=model.config, device=args.device)
    with matrix_products(bench, dtype, packed=False) as (products, flops):
        rates = [flops / seconds(products, args.device) for _ in range(5)]
    print(f"matrix products: {statistics.median(rates) / 1e12:.3g} TFLOP/s", flush=True)
    for name, (objective, what, flops) in works.items():
        for side, one in sides_of(objective, args).items():
            first, each = time_steps(model, one, what, args)
            share = flops / each / statistics.median(rates)
            print(
                f"{name:30} {side:16} {each * 1e3:9.2f} ms, {flops / each / 1e12:.3g} TFLOP/s,"
                f" {share:.0%} of the products' rate; the first step {first:.2f} s",
                flush=True,
            )


def time_steps(model: CausalLM, objective, what: str, args) -> tuple[float, float]:
    """Seconds of the first step, in which a graph is captured, and the median of the next ones."""
    parameters, rows = attach(model, what), [*range(len(objective))]
    optimizer, schedule = optimizer_for(parameters, 1e-3), Schedule(1e-3, 1, l1=1e-4)

    def step() -> None:
        train_step(optimizer, parameters, objective.loss(rows), schedule, 0, 1)

    first = seconds(step, args.device)
    return first, statistics.median(seconds(step, args.device) for _ in range(args.rounds))


def decoding(args: argparse.Namespace) -> None:
    """Greedy decoding after one and after 16 prompts of 40 tokens: the same tokens or not, and the
    share of the memory's bandwidth that reading the weights takes. Offsets in the upper half,
    folded, as in an evaluation."""
    rng = random.Random(0)
    model = random_model(SHAPES[args.shape], DTYPES[args.dtype], args.device)
    layers = model.config.num_hidden_layers
    offsets = init_offsets(model, layers - layers // 2, 0)
    attach_offsets(model, [(i, 0) for i in range(layers // 2, layers)], offsets)
    n_bytes = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    copies, copied = big_copies(args.device)
    bandwidth = copied / statistics.median(seconds(copies, args.device) for _ in range(5))
    print(f"copies: {bandwidth / 1e12:.3g} TB/s; weights of a step: {n_bytes / 1e9:.2f} GB")
    for rows in (1, 16):
        ids = [[rng.randrange(3, model.config.vocab_size) for _ in range(40)] for _ in range(rows)]
        sides = {"eager": Decoding(), "padded": GraphedDecoding(capture=False)}
        sides |= {} if args.device == "cpu" else {"graph": GraphedDecoding()}
        with folded_offsets(model):
            found = {side: time_decoding(model, ids, how, args) for side, how in sides.items()}
        for side, (first, each, new) in found.items():
            pairs = zip(found["eager"][2], new, strict=True)
            equal = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))
            print(
                f"{rows:2} rows, {side:7} {each * 1e3:9.2f} ms a step,"
                f" {n_bytes / each / bandwidth:.0%} of the bandwidth; the first time {first:.2f} s;"
                f" {equal} of {rows * args.tokens} tokens as eager",
                flush=True,
            )


def time_decoding(
    model: CausalLM, ids: list[list[int]], how: Decoding, args: argparse.Namespace
) -> tuple[float, float, list[list[int]]]:
    """(seconds of the first time, in which a graph is captured; of a step; the new tokens)."""
    new = []

    def run(n: int) -> None:
        new.append(generate(model, ids, n, (-1,), decoding=how))

    def median(n: int) -> float:
        return statistics.median(seconds(partial(run, n), args.device) for _ in range(args.rounds))

    first = seconds(partial(run, args.tokens), args.device)
    # the prompts and one step are in both
    return first, (median(args.tokens) - median(2)) / (args.tokens - 2), new[0]
