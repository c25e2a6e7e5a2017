"""The one training loop of both steps: AdamW on a few vectors, linear decay, clipping."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from lofit.errors import InputError
from lofit.llm.batches import draw_batches
from lofit.losses import l1_norm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. lr decays linearly to 0 over all steps, without warm-up."""

    lr: float
    epochs: int
    batch_size: int = 8
    l1: float = 0.0  # weight of sum |parameters| in the loss (head selection only)
    max_grad_norm: float = 1.0
    by_length: bool = True  # see `draw_batches`


def optimizer_for(parameters: list[torch.Tensor], lr: float) -> torch.optim.AdamW:
    """The paper's optimiser: AdamW with its defaults, but no weight decay."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def train_step(
    optimizer: torch.optim.AdamW,
    parameters: list[torch.Tensor],
    task_loss: torch.Tensor,
    schedule: Schedule,
    step: int,
    total: int,
) -> dict[str, float]:
    """One update at step 0 <= step < total; returns loss, task_loss, l1, grad_norm and lr.

    The gradient norm includes the L1 term, as in the paper's code. Raises InputError if the loss
    is not finite; the parameters are then as before the step.
    """
    lr = schedule.lr * (total - step) / total
    for group in optimizer.param_groups:
        group["lr"] = lr
    penalty = l1_norm(parameters)
    loss = task_loss + schedule.l1 * penalty if schedule.l1 else task_loss
    if not math.isfinite(loss.item()):
        raise InputError(
            f"the loss became {loss.item()} at step {step + 1} of {total} (lr {lr:.3g});"
            " try a smaller learning rate, or --dtype float32"
        )
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
    optimizer.step()
    values = {"loss": loss, "task_loss": task_loss, "l1": penalty, "grad_norm": grad_norm}
    return {name: value.item() for name, value in values.items()} | {"lr": lr}


def fit(
    parameters: list[torch.Tensor],
    lengths: list[int],
    loss_of: Callable[[list[int]], torch.Tensor],
    schedule: Schedule,
    seed: int,
    log: Callable[[dict], None],
) -> Iterator[tuple[int, float]]:
    """Train `parameters` in place; yields (epoch from 1, mean training loss) after each epoch.

    lengths: of the examples, in tokens; loss_of: indices of examples -> scalar task loss. Batches
    are drawn anew each epoch from the seed; a last, smaller one is used too. log gets one record a
    step.
    """
    optimizer = optimizer_for(parameters, schedule.lr)
    generator = torch.Generator().manual_seed(seed)
    total = math.ceil(len(lengths) / schedule.batch_size) * schedule.epochs
    step = 0
    with tqdm(total=total, unit="step", disable=None, leave=False) as bar:
        for epoch in range(schedule.epochs):
            losses = []
            size, by_length = schedule.batch_size, schedule.by_length
            for rows in draw_batches(lengths, size, generator, by_length):
                record = train_step(optimizer, parameters, loss_of(rows), schedule, step, total)
                step += 1
                log({"epoch": epoch + 1, "step": step} | record)
                losses.append(record["task_loss"])
                bar.update()
            yield epoch + 1, sum(losses) / len(losses)
