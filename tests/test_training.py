"""The loop: schedule, order, clipping, and six steps of each kind against the paper's code."""

import pytest
import torch

from lofit.errors import InputError
from lofit.training import Schedule, fit, optimizer_for, train_step


def collect(n_examples, schedule, seed=0):
    """Run `fit` on one number; returns the batches of examples and the logged records."""
    x, batches, records = torch.nn.Parameter(torch.tensor([5.0])), [], []

    def loss_of(rows):
        batches.append(rows)
        return (x * x).sum()

    epochs = list(fit([x], [1] * n_examples, loss_of, schedule, seed, records.append))
    return batches, records, epochs


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
