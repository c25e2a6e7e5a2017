"""What both steps share: which examples make a batch, and one update of a few vectors.

The loops themselves stand in select_heads.py and train.py.
"""

import math
from dataclasses import dataclass

import torch

from lofit.errors import InputError
from lofit.llm.batches import draw_batches


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. lr decays linearly to 0 over all steps, without warm-up."""

    lr: float
    epochs: int
    batch_size: int = 8
    l1: float = 0.0  # lambda, the weight of sum |A| in the loss (head selection alone)
    max_grad_norm: float = 1.0


def draw_epochs(
    lengths: list[int], schedule: Schedule, seed: int, by_length: bool
) -> list[list[list[int]]]:
    """The batches of each epoch, lists of example indices. by_length: see `draw_batches`."""
    # All are drawn beforehand: a run that was stopped and continues in epoch 20 then trains on the
    # batches that it would have had anyway.
    generator = torch.Generator().manual_seed(seed)
    return [
        draw_batches(lengths, schedule.batch_size, generator, by_length)
        for _ in range(schedule.epochs)
    ]


def make_optimizer(parameters: list[torch.Tensor], schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with its defaults, but no weight decay: it would pull every offset towards 0, which
    the paper's code does not do (its text says 0.01)."""
    # Adam divides each gradient by the root of its running mean square, so a value moves by about
    # lr a step, be its gradient large or small: lr is in the units of z, and a good one for offsets
    # is far above those for weights.
    return torch.optim.AdamW(
        parameters, lr=schedule.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )


def train_step(
    optimizer: torch.optim.AdamW, loss: torch.Tensor, schedule: Schedule, step: int, total: int
) -> dict[str, float]:
    """One update at step 0 <= step < total; returns what log.jsonl keeps of it.

    loss: the task's; the penalty on the parameters is added here. InputError if the sum or its
    gradient is not finite; the parameters are then those of the step before.
    """
    (group,) = optimizer.param_groups
    parameters = group["params"]
    # from lr down to lr / total: the last step still moves a little
    group["lr"] = schedule.lr * (total - step) / total

    # The penalty of head selection: sum |A| over all elements of all heads. It pulls each of them
    # towards 0 with the same force, however small it is, so only what pays for itself stays. The
    # force of a squared penalty would fade near 0, and leave a little of every head.
    l1 = torch.stack([p.abs().sum() for p in parameters]).sum()
    whole = loss + schedule.l1 * l1 if schedule.l1 else loss
    optimizer.zero_grad()
    # The base model is frozen: gradients pass through its layers, down to the lowest edit, but no
    # weight of it collects one. That is why a step is cheaper than one of full fine-tuning.
    whole.backward()
    # One odd batch shall not throw Adam's running means. The norm is that of the whole gradient,
    # the penalty's part too, as in the paper's code.
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
    # before anything moves: a step along a gradient that is no number would spoil every value
    for name, value in (("loss", whole.item()), ("gradient's norm", grad_norm.item())):
        if not math.isfinite(value):
            raise InputError(
                f"the {name} became {value} at step {step + 1} of {total} (lr {group['lr']:.3g});"
                " try a smaller --lr, or --dtype float32"
            )
    optimizer.step()
    return {
        "step": step + 1, "loss": whole.item(), "task_loss": loss.item(), "l1": l1.item(),
        "grad_norm": grad_norm.item(), "lr": group["lr"],
    }  # fmt: skip
