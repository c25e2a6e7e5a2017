"""Intervals over items and runs cover the truth of simulated studies as often as they say."""

import math

import pytest
import torch

from lofit.studies.intervals import interval, t_quantile

N_ITEMS, N_STUDIES = 400, 2000
BASE = 0


def hits(chance: torch.Tensor, generator) -> torch.Tensor:
    """0 or 1 by chance [run, item]."""
    drawn = torch.rand(chance.shape, generator=generator, dtype=torch.float64)
    return (drawn < chance).double()


def simulated(runs, spreads, generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(runs of one method, of another or the base model's, the true difference): items of unequal
    difficulty, some harder for one method; every run better or worse by its own."""
    sides, truth = [], 0.0
    item = 0.4 * (torch.rand(N_ITEMS, generator=generator, dtype=torch.float64) - 0.5)
    for n, spread, level, sign in zip(runs, spreads, (0.5, 0.4), (1, -1), strict=True):
        own = 0.2 * (torch.rand(N_ITEMS, generator=generator, dtype=torch.float64) - 0.5)
        run = spread * torch.randn(max(n, 1), 1, generator=generator, dtype=torch.float64)
        run = torch.zeros(1, 1) if n == BASE else run
        sides.append(hits(level + item + own + run, generator))
        truth += sign * (level + (run.item() if n == 1 else 0.0))  # one run: that very one
    return *sides, truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "spreads"),
    [((3, 5), (0.02, 0.09)), ((5, 5), (0.02, 0.06)), ((5, 5), (0.005, 0.005)),
     ((3, BASE), (0.03, 0.0)), ((1, BASE), (0.05, 0.0))],
)  # fmt: skip
def test_intervals_cover_the_truth_in_93_to_97_percent_of_studies(runs, spreads):
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(N_STUDIES):
        ones, others, truth = simulated(runs, spreads, generator)
        low, high = interval(ones, others)
        covered += low <= truth <= high
    assert 0.93 <= covered / N_STUDIES <= 0.97


def test_runs_that_differ_widen_the_interval_and_items_alone_do_not_tell():
    generator = torch.Generator().manual_seed(0)
    ones, others, _ = simulated((3, 5), (0.0, 0.15), generator)
    low, high = interval(ones, others)
    narrow = interval(*(side.mean(0, keepdim=True) for side in (ones, others)))
    assert high - low > 2 * (narrow[1] - narrow[0])
    assert sum(narrow) == pytest.approx(low + high)


def test_one_run_against_the_base_is_the_textbooks_interval_of_paired_items():
    """200 items, 60 gained and 20 lost: mean 0.2, standard error 0.0424."""
    base, tuned = [0.0] * 180 + [1.0] * 20, [1.0] * 60 + [0.0] * 140
    error = ((60 + 20) / 200 - 0.2**2) ** 0.5 / 199**0.5
    expected = (0.2 - 1.972 * error, 0.2 + 1.972 * error)
    assert interval([tuned], [base]) == pytest.approx(expected, abs=1e-4)
    assert interval([base], [base]) == (0, 0)
    assert interval(3 * [base], [base]) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (99, 1.984), (1e5, 1.96)]
)
def test_t_quantile_is_the_textbooks(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=5e-4)


def test_one_item_has_no_interval():
    assert all(map(math.isnan, interval([[1.0], [0.0]], [[0.0]])))
