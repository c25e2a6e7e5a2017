"""One step of training: schedule, penalty, clipping; and the batches of all epochs."""

import pytest
import torch

from lofit.errors import InputError
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step


def test_every_example_is_seen_once_an_epoch_in_a_new_order():
    for by_length in (False, True):
        schedule = Schedule(lr=0.1, epochs=2, batch_size=4)
        first, second = draw_epochs([3, 1, 2, 5, 4, 1, 1, 2, 9, 9], schedule, 0, by_length)
        for epoch in (first, second):
            assert sorted(map(len, epoch)) == [2, 4, 4]  # a smaller batch counts too
            assert sorted(sum(epoch, [])) == list(range(10))
        assert first != second
        assert draw_epochs([3, 1, 2, 5, 4, 1, 1, 2, 9, 9], schedule, 0, by_length)[0] == first
        assert draw_epochs([3, 1, 2, 5, 4, 1, 1, 2, 9, 9], schedule, 1, by_length)[0] != first


def test_the_learning_rate_falls_linearly_to_zero_without_warm_up():
    x, schedule = torch.nn.Parameter(torch.tensor([5.0])), Schedule(lr=0.8, epochs=1)
    optimizer = make_optimizer([x], schedule)
    records = [train_step(optimizer, x.square().sum(), schedule, i, 4) for i in range(4)]
    assert [r["lr"] for r in records] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [r["step"] for r in records] == [1, 2, 3, 4]


def test_l1_is_part_of_the_loss_and_of_the_clipped_gradient():
    x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    schedule = Schedule(lr=0.1, epochs=1, l1=2.0)
    record = train_step(make_optimizer([x], schedule), x.square().sum(), schedule, 0, 4)
    assert record["loss"] == pytest.approx(25 + 2 * 7)
    assert (record["task_loss"], record["l1"], record["lr"]) == pytest.approx((25, 7, 0.1))
    assert record["grad_norm"] == pytest.approx((8**2 + 10**2) ** 0.5)  # 2x + 2 sign(x)
    assert x.grad.norm().item() == pytest.approx(1.0, abs=1e-5)  # clipped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    x, schedule = torch.nn.Parameter(torch.tensor([1.0])), Schedule(0.1, 1)
    with pytest.raises(InputError, match="at step 3 of 4 .*smaller --lr"):
        train_step(make_optimizer([x], schedule), (x * value).sum(), schedule, 2, 4)
    assert x.item() == 1.0
