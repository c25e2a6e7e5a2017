"""Ways of choosing heads: each looks at a frozen model and its training examples, and gives every
head a score. The paper's is `scales`; the others are what it has to be compared with.

Offsets differ by far in size from head to head, so what is read off them is in units of each
head's own standard deviation of z (`head_sigma`).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lofit.heads import (
    SIGMA_TEXTS,
    attach_offsets,
    attach_scales,
    attention_layers,
    edits_off,
    gather_offsets,
    head_scores,
    head_sigma,
    init_offsets,
    init_scales,
)
from lofit.llm.model import CausalLM
from lofit.objectives import Objective
from lofit.run.resume import Progress
from lofit.run.session import Session
from lofit.training import Schedule, fit

FOLDS, PROBE_STEPS, PROBE_LR = 5, 200, 0.05  # of the probes
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete distribution (arXiv 1712.01312)


@dataclass(frozen=True)
class Ground:
    """What a way may look at."""

    model: CausalLM
    train: Objective
    schedule: Schedule
    seed: int
    log: Callable[[dict], None]
    penalty: float  # weight of the gates' L0 penalty; the scales' L1 is in the schedule
    contrast: Callable[[], list[tuple[list[int], list[int]]]]  # ids of (right, wrong) texts
    progress: Callable[..., Progress | None] = lambda *_: None  # where a stopped run goes on

    @property
    def grid(self) -> tuple[int, int]:
        """Layers, and query heads of each."""
        return self.model.config.num_hidden_layers, self.model.config.num_attention_heads

    def fit(self, parameters: list, loss=None, told=lambda: "", draws=()) -> None:
        """Train the parameters by the schedule; a line for each epoch, ended by told(). draws: the
        generators that the loss draws from."""
        train, schedule = self.train, self.schedule
        loss, progress = loss or train.loss, self.progress(train, *draws)
        lengths, seed = train.lengths, self.seed
        for epoch, value in fit(parameters, lengths, loss, schedule, seed, self.log, progress):
            print(f"epoch {epoch}/{schedule.epochs}  loss {value:.4f}{told()}")

    def offsets_of_all(self) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
        """Every head, initial offsets in units of sigma, and sigma: [heads]."""
        layers, per_layer = self.grid
        heads = [(layer, head) for layer in range(layers) for head in range(per_layer)]
        with edits_off(self.model):
            sigma = head_sigma(self.model, self.train.texts()[:SIGMA_TEXTS])
        return heads, init_offsets(self.model, len(heads), self.seed), sigma.flatten()


def by_scales(ground: Ground) -> torch.Tensor:
    """The norm of each head's learned scale (paper, section 3)."""
    model = ground.model
    parameters = attach_scales(model, init_scales(model, ground.seed))
    ground.fit(parameters, told=lambda: f"  sum of scores {head_scores(model).sum():.2f}")
    return head_scores(model)


def by_random(ground: Ground) -> torch.Tensor:
    """A draw of the seed: what a choice has to beat."""
    return torch.rand(ground.grid, generator=torch.Generator().manual_seed(ground.seed))


def by_spread(ground: Ground) -> torch.Tensor:
    """A draw with one head of every layer, in any order, before a second one of any."""
    generator = torch.Generator().manual_seed(ground.seed)
    layers, per_layer = ground.grid
    turns = torch.stack([torch.randperm(per_layer, generator=generator) for _ in range(layers)])
    return turns + torch.rand(ground.grid, generator=generator)


def by_gradient(ground: Ground) -> torch.Tensor:
    """sigma * ||dL/dv|| at v = 0, L the mean training loss: one pass over the data."""
    heads, init, sigma = ground.offsets_of_all()
    parameters = attach_offsets(ground.model, heads, torch.zeros_like(init), sigma)
    train, size = ground.train, ground.schedule.batch_size
    whole = train.weight(list(range(len(train))))
    for start in range(0, len(train), size):
        rows = list(range(start, min(start + size, len(train))))
        (train.loss(rows) * (train.weight(rows) / whole)).backward()
    return torch.stack([p.grad for p in parameters]).norm(dim=-1)


def by_offsets(ground: Ground) -> torch.Tensor:
    """The norm of offsets trained on all heads at once, in units of sigma."""
    heads, init, sigma = ground.offsets_of_all()
    ground.fit(attach_offsets(ground.model, heads, init, sigma))
    return (gather_offsets(ground.model, heads).norm(dim=-1) / sigma).view(ground.grid)


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


def by_gates(ground: Ground) -> torch.Tensor:
    """How probably each head's gate is open, trained with an L0 penalty: `penalty` times the
    number of open gates."""
    _, init, sigma = ground.offsets_of_all()
    device = ground.model.lm_head.weight.device
    generator = torch.Generator().manual_seed(ground.seed)
    init, sigma = init.view(*ground.grid, -1).to(device), sigma.view(ground.grid).to(device)
    edits = [GatedOffset(init[i], sigma[i], generator) for i in range(len(sigma))]
    for attention, edit in zip(attention_layers(ground.model), edits, strict=True):
        attention.head_out = edit

    def n_open() -> torch.Tensor:
        return torch.stack([edit.open().sum() for edit in edits]).sum()

    ground.fit(
        [p for edit in edits for p in edit.parameters()],
        lambda rows: ground.train.loss(rows) + ground.penalty * n_open(),
        lambda: f"  gates open {n_open():.1f}",
        (generator,),
    )
    return torch.stack([edit.open().detach() for edit in edits])


def by_probe(ground: Ground) -> torch.Tensor:
    """ITI's criterion (arXiv 2306.03341, section 3.1): how well a linear probe on a head's z at the
    last token tells right answers from wrong ones; accuracy by cross-validation over pairs."""
    return probe_accuracy(ground.model, ground.contrast(), ground.seed)


def probe_accuracy(
    model: CausalLM, pairs: list[tuple[list[int], list[int]]], seed: int
) -> torch.Tensor:
    """[layer, head] of probes on pairs of (right, wrong) texts; see `by_probe`."""
    with edits_off(model):
        z = last_z(model, [text for pair in pairs for text in pair])
    grid, z = z.shape[1:3], z.flatten(1, 2)
    right = torch.tensor([1.0, 0.0]).repeat(len(pairs))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(len(pairs), dtype=torch.int64)
    fold[order] = torch.arange(len(pairs)) % min(FOLDS, len(pairs))
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
    z, z_new = (z - mean) / std, (z_new - mean) / std
    w = torch.zeros(z.shape[1:], requires_grad=True)
    b = torch.zeros(z.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=PROBE_LR)
    for _ in range(PROBE_STEPS):
        logits = (z * w).sum(-1) + b
        loss = F.binary_cross_entropy_with_logits(logits, right[:, None].expand_as(logits))
        loss = loss * z.shape[1] + w.square().sum() / (2 * len(z))  # separate for each head
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (((z_new * w).sum(-1) + b) > 0) == (right_new[:, None] > 0.5)


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


WAYS = {
    "scales": by_scales, "random": by_random, "spread": by_spread, "probe": by_probe,
    "gradient": by_gradient, "offsets": by_offsets, "gates": by_gates,
}  # fmt: skip
# (peak lr, weight of the penalty) of ways that train something else than the recipe's scales
TRAINED = {"offsets": (0.03, 0.0), "gates": (0.03, 1e-3)}


def ground_of(args: argparse.Namespace, run: Session) -> Ground:
    """What the way --by looks at; reads and prints the settings that it uses."""
    recipe, by = run.recipe, args.by
    lr, penalty = TRAINED.get(by, (recipe.select_lr, recipe.l1))
    origin = f"default of --by {by}" if by in TRAINED else None
    schedule = Schedule(lr, recipe.select_epochs, recipe.batch_size, by_length=not args.plain)
    if by == "scales" or by in TRAINED:
        lr = run.setting("lr", args.lr, lr, origin)
        penalty = run.setting("l1", args.l1, penalty, origin)
        schedule = Schedule(
            lr=lr,
            l1=penalty if by == "scales" else 0.0,
            epochs=run.setting("epochs", args.epochs, recipe.select_epochs),
            batch_size=run.setting("batch_size", args.batch_size, recipe.batch_size),
            by_length=not args.plain,
        )
    examples = run.read("train", args.n_train)
    train = run.objective(examples, "train")
    what = "learning a scale for every head" if by == "scales" else f"scoring every head by {by}"
    print(f"{what} on {len(train)} examples")
    pairs = partial(run.contrast, examples)
    return Ground(run.model, train, schedule, run.seed, run.log, penalty, pairs, run.progress)
