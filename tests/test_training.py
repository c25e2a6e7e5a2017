"""The loop: schedule, order, clipping, and six steps of each kind against the paper's code."""

import pytest
import torch

from lofit.errors import InputError
from lofit.training import Schedule, Training, fit, optimizer_for, train_step


class Objective:
    """The loss x^2, whatever the examples; `batches` are those it was asked for."""

    def __init__(self, x, n_examples):
        self.x, self.lengths, self.batches = x, [1] * n_examples, []

    def loss(self, rows):
        self.batches.append(rows)
        return (self.x * self.x).sum()


def collect(n_examples, schedule, seed=0):
    """Run `fit` on one number; returns the batches of examples and the records of the steps."""
    x, records = torch.nn.Parameter(torch.tensor([5.0])), []
    objective = Objective(x, n_examples)
    training = Training([x], objective, schedule, seed)
    epochs = list(fit(training, lambda training, record: records.append(record)))
    return objective.batches, records, epochs


def test_a_training_continues_after_the_steps_that_are_done():
    x = torch.nn.Parameter(torch.tensor([5.0]))
    schedule = Schedule(lr=0.1, epochs=3, batch_size=3)  # 4 steps an epoch
    whole = Training([x], Objective(x, 10), schedule, 0)
    list(fit(whole))
    part = Training([x], Objective(x, 10), schedule, 0)
    part.losses.extend([1.0] * 5)
    steps = []
    epochs = list(fit(part, lambda _, record: steps.append((record["epoch"], record["step"]))))
    assert part.objective.batches == whole.objective.batches[5:]
    assert steps == [(2, 6), (2, 7), (2, 8), (3, 9), (3, 10), (3, 11), (3, 12)]
    assert [number for number, _ in epochs] == [2, 3]
    assert len(part.losses) == part.total == 12
    # stopped at the end of an epoch, it may not have been validated: it is yielded again
    part = Training([x], Objective(x, 10), schedule, 0)
    part.losses.extend([1.0] * 8)
    assert [number for number, _ in fit(part)] == [2, 3]


def test_learning_rate_falls_linearly_to_zero_without_warm_up():
    _, records, _ = collect(6, Schedule(lr=0.8, epochs=2, batch_size=3))
    assert [r["lr"] for r in records] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_every_example_is_seen_once_an_epoch_in_a_new_order():
    batches, _, epochs = collect(10, Schedule(lr=0.1, epochs=2, batch_size=4))
    sizes = [len(rows) for rows in batches]
    assert sorted(sizes[:3]) == sorted(sizes[3:]) == [2, 4, 4]  # a smaller batch counts too
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [number for number, _ in epochs] == [1, 2]
    again, _, _ = collect(10, Schedule(lr=0.1, epochs=2, batch_size=4))
    assert again == batches
    assert collect(10, Schedule(lr=0.1, epochs=2, batch_size=4), seed=1)[0] != batches


def test_l1_is_part_of_the_loss_and_of_the_clipped_gradient():
    x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    schedule = Schedule(lr=0.1, epochs=1, l1=2.0)
    record = train_step(optimizer_for([x], 0.1), [x], x.square().sum(), schedule, 0, 4)
    assert record["loss"] == pytest.approx(25 + 2 * 7)
    assert (record["task_loss"], record["l1"], record["lr"]) == pytest.approx((25, 7, 0.1))
    assert record["grad_norm"] == pytest.approx((8**2 + 10**2) ** 0.5)  # 2x + 2 sign(x)
    assert x.grad.norm().item() == pytest.approx(1.0, abs=1e-5)  # clipped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    x = torch.nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(InputError, match="at step 3 of 4 .*smaller learning rate"):
        train_step(optimizer_for([x], 0.1), [x], (x * value).sum(), Schedule(0.1, 1), 2, 4)
    assert x.item() == 1.0
