"""The one training loop of both steps: AdamW on a few vectors, linear decay, clipping."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from lofit.errors import InputError, held_back
from lofit.llm.batches import draw_batches
from lofit.losses import l1_norm
from lofit.run.resume import Progress


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
    progress: Progress | None = None,
) -> Iterator[tuple[int, float]]:
    """Train `parameters` in place; yields (epoch from 1, mean training loss) after each epoch.

    lengths: of the examples, in tokens; loss_of: indices of examples -> scalar task loss. Batches
    are drawn anew each epoch from the seed; a last, smaller one is used too. log gets one record a
    step. progress: where a run that was stopped goes on; epochs that were over are not yielded.
    """
    progress = progress or Progress()
    optimizer = optimizer_for(parameters, schedule.lr)
    generator = torch.Generator().manual_seed(seed)
    total = math.ceil(len(lengths) / schedule.batch_size) * schedule.epochs
    step, done = 0, progress.restore(parameters, optimizer)
    with tqdm(total=total, initial=done, unit="step", disable=None, leave=False) as bar:
        for epoch in range(schedule.epochs):
            batches = draw_batches(lengths, schedule.batch_size, generator, schedule.by_length)
            for rows in batches:
                step += 1
                if step <= done:
                    progress.again(rows, first=epoch == 0)
                    continue
                with held_back():  # a signal waits: the update and its state belong together
                    loss = loss_of(rows)
                    record = train_step(optimizer, parameters, loss, schedule, step - 1, total)
                    log({"epoch": epoch + 1, "step": step} | record)
                    progress.save(record["task_loss"], last=step == total)
                bar.update()
            if step >= done:
                losses = progress.losses[step - len(batches) : step]
                yield epoch + 1, sum(losses) / len(losses)
