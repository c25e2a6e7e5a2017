"""Other ways to choose heads: each gives every head a score. LoFiT's own is in select_heads.py.

The outputs of heads differ much in size, so gradients are in units of each head's own standard
deviation of z (`head_sigma`).
"""

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lofit.errors import InputError
from lofit.heads import attach_offsets, attention_layers, edits_off, every_head, head_grid
from lofit.llm.model import CausalLM
from lofit.objectives import Objective
from lofit.run.setup import Run, make_objective
from lofit.tasks import Example

FOLDS, PROBE_STEPS, PROBE_LR = 5, 200, 0.05  # of the probes
SIGMA_TEXTS = 64  # enough for a standard deviation


def score_heads(by: str, run: Run, n_train: int | None) -> torch.Tensor:
    """The scores of all heads by the way that --by names: [layer, head]."""
    return SCORERS[by](run, run.read("train", n_train))


def by_random(run: Run, examples: list[Example]) -> torch.Tensor:
    """Scores drawn by the seed: what a choice has to beat."""
    return torch.rand(head_grid(run.model), generator=torch.Generator().manual_seed(run.seed))


def by_gradient(run: Run, examples: list[Example]) -> torch.Tensor:
    """sigma * ||dL/dv|| at v = 0, L the mean training loss: one pass over the data."""
    print(f"scoring every head by gradient on {len(examples)} examples")
    objective = make_objective(run, examples, "train")
    return head_gradients(run.model, objective, run.recipe.batch_size)


def head_gradients(model: CausalLM, objective: Objective, batch_size: int) -> torch.Tensor:
    """sigma * ||dL/dv|| of each head at v = 0: [layer, head]. L: the mean loss of the objective."""
    with edits_off(model):
        sigma = head_sigma(model, [ids for ids, _ in objective.texts[:SIGMA_TEXTS]])
    heads = every_head(model)
    parameters = attach_offsets(model, heads, torch.zeros(len(heads), model.config.head_dim))
    n = len(objective.lengths)
    parts = [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
    total = sum(objective.weight(objective.batch(rows)) for rows in parts)
    for rows in parts:
        batch = objective.batch(rows)
        (objective.loss(batch) * (objective.weight(batch) / total)).backward()
    return torch.stack([p.grad for p in parameters]).norm(dim=-1).cpu() * sigma


def by_probe(run: Run, examples: list[Example]) -> torch.Tensor:
    """ITI's criterion (arXiv 2306.03341, section 3.1): how well a linear probe on a head's z at the
    last token tells right answers from wrong ones; accuracy by cross-validation over pairs."""
    if len(examples) < 2:  # one to learn from, one to be asked about
        raise InputError("--by probe: takes 2 examples or more; of one all heads score alike")
    with edits_off(run.model):
        return probe_accuracy(last_z(run.model, contrast(run, examples)), run.seed)


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
    """Fit a logistic regression to each head, z: [n, heads, head_dim] and right: [n] (0 or 1), with
    scikit-learn's penalty. Returns whether it is right about each new text: [m, heads] bool."""
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
def read_texts(model: CausalLM, texts: list[list[int]], hooks: list) -> None:
    """Let the model read texts (ids) one by one, then remove the hooks."""
    try:
        for ids in texts:
            model.model(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()


def last_z(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """Each head's z at the last token of each text: [texts, layer, head, head_dim] fp32 on CPU."""
    found: list[torch.Tensor] = []
    hooks = [
        a.head_out.register_forward_pre_hook(lambda _, args: found.append(args[0][0, -1].float()))
        for a in attention_layers(model)
    ]
    read_texts(model, texts, hooks)
    return torch.stack(found).unflatten(0, (len(texts), -1)).cpu()


def head_sigma(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """The standard deviation of each head's z over all positions of these texts (ids), pooled over
    head_dim: [layer, head] fp32 on CPU."""
    shape, device = (*head_grid(model), model.config.head_dim), model.lm_head.weight.device
    # float64, where sums lose nothing; Apple's GPUs have no more than float32
    wide = torch.float32 if device.type == "mps" else torch.float64
    total, square = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))

    def add(layer: int, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        z = args[0][0].to(wide)  # one text, so no padding: [position, n_heads, head_dim]
        total[layer] += z.sum(0)
        square[layer] += z.square().sum(0)

    hooks = [
        attention.head_out.register_forward_pre_hook(partial(add, layer))
        for layer, attention in enumerate(attention_layers(model))
    ]
    read_texts(model, texts, hooks)
    n = sum(map(len, texts))
    return (square / n - (total / n).square()).clamp(min=0).mean(-1).sqrt().float().cpu()


def contrast(run: Run, examples: list[Example]) -> list[list[int]]:
    """The ids of prompt + right answer and of prompt + wrong answer of each example, in turns.
    Wrong is what was rejected, what was true before the edit, another choice, or else another
    example's answer."""
    answers = sorted({e.answer for e in examples})
    draw, found = random.Random(run.seed), []
    for e in examples:
        others = [answer for answer in answers if answer != e.answer]
        known = [e.rejected] if e.rejected else [*e.outdated, *e.wrong]
        if not known and not others:
            path = run.task.file(run.data, "train")
            raise InputError(f"{path}: all answers are the same, there is no wrong one")
        texts = (e.answer, known[0] if known else draw.choice(others))
        prompt = run.wrap(e.prompt)
        found += [run.tokenizer.encode_pair(prompt, text)[0] for text in texts]
    return found


SCORERS = {"gradient": by_gradient, "probe": by_probe, "random": by_random}
