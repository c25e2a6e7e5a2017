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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    x, schedule = torch.nn.Parameter(torch.tensor([1.0])), Schedule(0.1, 1)
    with pytest.raises(InputError, match="at step 3 of 4 .*smaller --lr"):
        train_step(make_optimizer([x], schedule), (x * value).sum(), schedule, 2, 4)
    assert x.item() == 1.0
