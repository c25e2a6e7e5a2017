"""The one training loop of both steps: AdamW on a few vectors, linear decay, clipping."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

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


class Training:
    """One training: what is trained, on which batches, and how far it is.

    parameters: tensors that are changed in place; objective: see objectives.py; epochs: the batches
    of each epoch, lists of example indices, drawn by the seed (a last, smaller batch is used too);
    losses: the task loss of each step that is done; generators: what the loss draws from, if
    anything.
    """

    def __init__(
        self,
        parameters: list[torch.Tensor],
        objective,
        schedule: Schedule,
        seed: int,
        generators: tuple[torch.Generator, ...] = (),
    ):
        self.parameters, self.objective, self.schedule = parameters, objective, schedule
        self.generators = generators
        self.optimizer = optimizer_for(parameters, schedule.lr)
        generator = torch.Generator().manual_seed(seed)
        self.epochs = [
            draw_batches(objective.lengths, schedule.batch_size, generator, schedule.by_length)
            for _ in range(schedule.epochs)
        ]
        self.total = sum(map(len, self.epochs))  # steps
        self.losses: list[float] = []


OnStep = Callable[[Training, dict], object]


def fit(
    training: Training, on_step: OnStep = lambda training, record: None
) -> Iterator[tuple[int, float]]:
    """Train; yields (epoch from 1, mean task loss) after each epoch.

    on_step: called after each step with the training and a record of the step: epoch, step (from
    1), loss, task_loss, l1, grad_norm, lr. A training some of whose steps are done goes on after
    them. Raises InputError if the loss is not finite.
    """
    done, end = len(training.losses), 0
    for epoch, batches in enumerate(training.epochs, start=1):
        begin, end = end, end + len(batches)
        for step in range(max(begin, done), end):
            task_loss = training.objective.loss(batches[step - begin])
            record = train_step(
                training.optimizer, training.parameters, task_loss, training.schedule,
                step, training.total,
            )  # fmt: skip
            training.losses.append(record["task_loss"])
            on_step(training, {"epoch": epoch, "step": step + 1} | record)
        if end >= done:
            yield epoch, sum(training.losses[begin:end]) / len(batches)


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
