"""Other ways to choose heads: each gives every head a score. LoFiT's own stands in select_heads.py.

Heads differ by far in the size of their outputs, so gradients and gates are in units of each head's
own standard deviation of z (`head_sigma`).
"""

import argparse
import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lofit.errors import InputError
from lofit.heads import (
    attach_offsets,
    attention_layers,
    edits_off,
    head_grid,
    init_offsets,
    set_edits,
)
from lofit.llm.device import widest
from lofit.llm.model import CausalLM
from lofit.objectives import Objective
from lofit.run.artefacts import load_heads, other_task
from lofit.run.session import Session
from lofit.tasks import Example
from lofit.training import Schedule, Training, fit

FOLDS, PROBE_STEPS, PROBE_LR = 5, 200, 0.05  # of the probes
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete distribution (arXiv 1712.01312)
GATES_LR, GATES_L0 = 0.03, 1e-3  # defaults of --lr and --l1 with --by gates
SIGMA_TEXTS = 64  # enough for a standard deviation


def check_by(args: argparse.Namespace) -> None:
    """InputError unless --by names a way to choose heads and takes the flags that are given."""
    way, _, other = args.by.partition(":")
    if (way == "task") != bool(other) or way not in (*SCORERS, "task"):
        names = ", ".join(("scales", *SCORERS))
        raise InputError(f"--by {args.by}: expected {names}, or task:OTHER")
    trains, reads = way == "gates", way in ("gates", "gradient", "probe")
    for name, applies in (
        ("lr", trains), ("l1", trains), ("epochs", trains),
        ("batch_size", trains or way == "gradient"), ("n_train", reads),
        ("compile", trains or way == "gradient"),
    ):  # fmt: skip
        if getattr(args, name) is not None and not applies:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: --by {args.by} does not use it; leave it out")


def score_heads(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """The scores of all heads by the way that --by names: [layer, head]."""
    way, _, other = args.by.partition(":")
    run.settings["by"] = args.by
    if other:
        return load_heads(other_task(other, run.base_folder, run.fold), run.model)[1]
    return SCORERS[way](args, run)


def by_random(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """A draw by the seed: what a choice has to beat."""
    return torch.rand(head_grid(run.model), generator=torch.Generator().manual_seed(run.seed))


def by_spread(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """A draw with one head of every layer, in any order, before a second one of any."""
    generator, (layers, per_layer) = torch.Generator().manual_seed(run.seed), head_grid(run.model)
    turns = torch.stack([torch.randperm(per_layer, generator=generator) for _ in range(layers)])
    return turns + torch.rand((layers, per_layer), generator=generator)


def by_gradient(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """sigma * ||dL/dv|| at v = 0, L the mean training loss: one pass over the data."""
    size = args.batch_size or run.recipe.batch_size
    objective = _objective(args, run)
    return head_gradients(run.model, objective, size)


def head_gradients(model: CausalLM, objective: Objective, batch_size: int) -> torch.Tensor:
    """sigma * ||dL/dv|| of each head at v = 0: [layer, head]. L: the mean loss of the objective."""
    sigma, grid = _sigma(model, objective), head_grid(model)
    zeros = torch.zeros(grid[0] * grid[1], model.config.head_dim)
    parameters = attach_offsets(model, _all_heads(model), zeros)
    total = objective.weight(list(range(len(objective))))
    for start in range(0, len(objective), batch_size):
        rows = list(range(start, min(start + batch_size, len(objective))))
        (objective.loss(rows) * (objective.weight(rows) / total)).backward()
    return torch.stack([p.grad for p in parameters]).norm(dim=-1).cpu() * sigma


def by_gates(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """How probably each head's gate is open, trained with an L0 penalty on the open gates."""
    origin = "default of --by gates"
    lr = run.setting("lr", args.lr, GATES_LR, origin)
    penalty = run.setting("l1", args.l1, GATES_L0, origin)
    schedule = Schedule(
        lr=lr,
        epochs=run.setting("epochs", args.epochs, run.recipe.select_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    objective = _objective(args, run)
    generator = torch.Generator().manual_seed(run.seed)
    edits = attach_gates(run.model, _sigma(run.model, objective), run.seed, generator)

    def n_open() -> torch.Tensor:
        return torch.stack([edit.open().sum() for edit in edits]).sum()

    parameters = [p for edit in edits for p in edit.parameters()]
    penalised = Penalised(objective, lambda: penalty * n_open())
    training = Training(parameters, penalised, schedule, run.seed, (generator,))
    with run.recorded(training) as on_step:
        for epoch, loss in fit(training, on_step):
            print(f"epoch {epoch}/{schedule.epochs}  loss {loss:.4f}  gates open {n_open():.1f}")
    return torch.stack([edit.open().detach() for edit in edits])


class Penalised:
    """An objective with a penalty added to its loss."""

    def __init__(self, objective: Objective, penalty: Callable[[], torch.Tensor]):
        self.objective, self.penalty = objective, penalty
        self.lengths, self.hash = objective.lengths, objective.hash
        self.fill_cache = objective.fill_cache

    def loss(self, rows: list[int]) -> torch.Tensor:
        return self.objective.loss(rows) + self.penalty()


def attach_gates(
    model: CausalLM, sigma: torch.Tensor, seed: int, generator: torch.Generator
) -> list["GatedOffset"]:
    """Put a GatedOffset into every layer. sigma: [layer, head]."""
    grid, device = head_grid(model), model.lm_head.weight.device
    init = init_offsets(model, grid[0] * grid[1], seed).view(*grid, -1).to(device)
    sigma = sigma.to(device)
    edits = [GatedOffset(init[i], sigma[i], generator) for i in range(grid[0])]
    set_edits(model, edits)
    return edits


class GatedOffset(nn.Module):
    """z <- z + gate * sigma * u on every head of a layer. gate: hard concrete, one a head, drawn
    at each step (Louizos et al., arXiv 1712.01312, equations 10 and 11; JoLA, arXiv 2502.01179,
    gates edits of heads by it).

    offset: u, [n_heads, head_dim]; sigma: [n_heads]; log_alpha: of the gates, [n_heads].
    """

    def __init__(self, offset: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator):
        super().__init__()
        self.offset = nn.Parameter(offset)
        self.log_alpha = nn.Parameter(torch.zeros_like(sigma))
        self.sigma, self.generator = sigma, generator

    def gate(self) -> torch.Tensor:
        """A draw of each head's gate, in [0, 1]."""
        u = torch.rand(len(self.sigma), generator=self.generator).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((u.logit().to(self.sigma.device) + self.log_alpha) / BETA)
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def open(self) -> torch.Tensor:
        """P(gate > 0) of each head (equation 12)."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z + (self.gate() * self.sigma)[:, None] * self.offset).to(z.dtype)


def by_probe(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """ITI's criterion (arXiv 2306.03341, section 3.1): how well a linear probe on a head's z at the
    last token tells right answers from wrong ones; accuracy by cross-validation over pairs."""
    with edits_off(run.model):
        z = last_z(run.model, contrast(run, run.read("train", args.n_train)))
    return probe_accuracy(z, run.seed)


def probe_accuracy(z: torch.Tensor, seed: int) -> torch.Tensor:
    """[layer, head] of probes on z, [2 n, layer, head, head_dim], of right and wrong texts in
    turns; see `by_probe`."""
    n, grid, z = len(z) // 2, z.shape[1:3], z.flatten(1, 2)
    right = torch.tensor([1.0, 0.0]).repeat(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(n, dtype=torch.int64)
    fold[order] = torch.arange(n) % min(FOLDS, n)
    fold = fold.repeat_interleave(2)  # both texts of a pair are on the same side
    hits = [hits_of_probes(z[fold != f], right[fold != f], z[fold == f], right[fold == f])
            for f in fold.unique()]  # fmt: skip
    return torch.cat(hits).float().mean(0).view(grid)


def hits_of_probes(
    z: torch.Tensor, right: torch.Tensor, z_new: torch.Tensor, right_new: torch.Tensor
) -> torch.Tensor:
    """Fit a logistic regression on each head, z: [n, heads, head_dim] and right: [n] (0 or 1), with
    scikit-learn's penalty; whether each tells the new ones: [m, heads] bool."""
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    # [heads, n, head_dim]: a matrix product a head
    z, z_new = (((x - mean) / std).transpose(0, 1).contiguous() for x in (z, z_new))
    w = torch.zeros(len(z), z.shape[2], 1, requires_grad=True)
    b = torch.zeros(len(z), 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=PROBE_LR)
    goal = right[:, None].expand(*z.shape[:2], 1)
    for _ in range(PROBE_STEPS):
        loss = F.binary_cross_entropy_with_logits(z @ w + b, goal)
        loss = loss * len(z) + w.square().sum() / (2 * z.shape[1])  # separate for each head
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return ((z_new @ w + b) > 0).squeeze(2).T == (right_new[:, None] > 0.5)


@torch.no_grad()
def last_z(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """Each head's z at the last token of each text: [texts, layer, head, head_dim] fp32 on CPU."""
    found: list[torch.Tensor] = []
    hooks = [
        a.head_out.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1].float()))
        for a in attention_layers(model)
    ]
    try:
        for ids in texts:
            model.model(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).unflatten(0, (len(texts), -1)).cpu()


@torch.no_grad()
def head_sigma(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """The standard deviation of each head's z over all positions of these texts (ids), pooled over
    head_dim: [layer, head] fp32 on CPU."""
    layers, shape = attention_layers(model), (*head_grid(model), model.config.head_dim)
    device = model.lm_head.weight.device
    wide = widest(device)
    total, square = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))

    def reader(layer: int):
        def read(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            z = args[0][0].to(wide)  # one text, so no padding: [position, n_heads, head_dim]
            total[layer] += z.sum(0)
            square[layer] += z.square().sum(0)

        return read

    hooks = [a.head_out.register_forward_pre_hook(reader(i)) for i, a in enumerate(layers)]
    try:
        for ids in texts:
            model.model(torch.tensor([ids], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    n = sum(map(len, texts))
    return (square / n - (total / n).square()).clamp(min=0).mean(-1).sqrt().float().cpu()


def contrast(run: Session, examples: list[Example]) -> list[list[int]]:
    """The ids of prompt + right answer and of prompt + wrong answer of each example, in turns.
    Wrong is what was rejected, what was true before the edit, another choice, or else another
    example's answer."""
    answers = sorted({e.answer for e in examples})
    draw, found = random.Random(run.seed), []
    for e in examples:
        others = [answer for answer in answers if answer != e.answer]
        known = [e.rejected] if e.rejected else [*e.outdated, *e.wrong]
        if not known and not others:
            raise InputError(f"{run.data}: all answers are the same, there is no wrong one")
        texts = (e.answer, known[0] if known else draw.choice(others))
        prompt = run.wrap(e.prompt)
        found += [run.tokenizer.encode_pair(prompt, text)[0] for text in texts]
    return found


def _objective(args: argparse.Namespace, run: Session) -> Objective:
    objective = run.objective(run.read("train", args.n_train), "train")
    print(f"scoring every head by {args.by} on {len(objective)} examples")
    return objective


def _all_heads(model: CausalLM) -> list[tuple[int, int]]:
    layers, per_layer = head_grid(model)
    return [(layer, head) for layer in range(layers) for head in range(per_layer)]


def _sigma(model: CausalLM, objective: Objective) -> torch.Tensor:
    with edits_off(model):
        return head_sigma(model, objective.texts()[:SIGMA_TEXTS])


SCORERS = {
    "gradient": by_gradient, "gates": by_gates, "probe": by_probe, "random": by_random,
    "spread": by_spread,
}  # fmt: skip
