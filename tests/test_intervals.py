"""Intervals over items and runs cover the truth of simulated studies as often as they say."""

import pytest
import torch
from interval_coverage import MIXES, covered

from lofit.studies.intervals import (
    Difference,
    Spread,
    difference,
    holm,
    pooled,
    run_spread,
    t_quantile,
)

N_ITEMS, N_STUDIES = 400, 2000
BASE = 0


def interval(*sides, **more) -> tuple[float, float]:
    return difference(*sides, **more).interval()


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
    ("df", "t"), [(1, 12.706), (1.05, 11.362), (2, 4.303), (4, 2.776), (99, 1.984), (1e5, 1.96)]
)
def test_t_quantile_is_the_textbooks(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=5e-4)


SIZES = [49, 32, 28, 27, 27, 22, *10 * [10], *40 * [4], *419 * [1]]  # much like MQuAKE's edits


@pytest.mark.slow
@pytest.mark.parametrize("runs", [1, 3, 5])
@pytest.mark.parametrize("mix", ["two methods", "method, base"])
def test_intervals_by_group_cover_the_truth_where_those_by_item_do_not(mix, runs):
    groups = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    of_base = mix == "method, base"
    found = [covered(MIXES[mix], runs, groups, i, runs == 1, of_base) for i in range(400)]
    by_item, by_group = (sum(hit for hit, _ in each) / 400 for each in zip(*found, strict=True))
    assert 0.92 <= by_group <= 0.98 and by_item < 0.91


def test_groups_of_one_item_change_nothing_and_copies_of_items_count_once():
    generator = torch.Generator().manual_seed(0)
    ones, others, _ = simulated((3, 5), (0.02, 0.09), generator)
    plain = interval(ones, others)
    numbers = torch.randperm(N_ITEMS, generator=generator)
    assert interval(ones, others, groups=numbers.tolist()) == pytest.approx(plain, abs=1e-12)
    three = [side.repeat_interleave(3, dim=1) for side in (ones, others)]
    of = torch.arange(N_ITEMS).repeat_interleave(3)
    assert interval(*three, groups=of.tolist()) == pytest.approx(plain, abs=1e-12)
    low, high = interval(*three)
    assert high - low < plain[1] - plain[0]


def test_the_spread_of_runs_is_what_their_means_vary_by_and_can_be_borrowed():
    """Items that are all alike leave the runs alone: the variance of their means."""
    cells = [[[x] * 4 for x in runs] for runs in ([0.1, 0.3], [0.5, 0.5, 0.8])]
    spread = run_spread([(cell, None) for cell in cells])
    assert spread.variance == pytest.approx((0.02 + 0.06) / 3)
    assert spread.df == pytest.approx(0.08**2 / (0.02**2 + 0.06**2 / 2))  # 32 / 11
    ones, base = [[0.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]
    alone, lent = (difference(ones, base, borrowed=(each, None)) for each in (None, spread))
    assert alone.runs.variance == 0 and lent.runs.variance == pytest.approx(spread.variance)
    assert lent.items == alone.items and lent.error > alone.error
    several = difference(2 * ones, base, borrowed=(spread, None))
    assert several.runs.variance == 0  # two runs tell for themselves


def test_p_is_one_less_the_level_whose_interval_ends_at_zero():
    found = Difference(2.1, Spread(1.0, 20), Spread(0.5, 3))
    ends = found.interval(1 - found.p)
    assert ends[0] == pytest.approx(0, abs=1e-6) and 0 < found.p < 1
    # 2.086 is the t of 20 degrees of freedom
    assert Difference(-2.086, Spread(1.0, 20), Spread(0.0, 1)).p == pytest.approx(0.05, abs=1e-4)
    assert Difference(0.0, Spread(0.0, 9), Spread(0.0, 1)).p == 1


def test_holm_corrects_for_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_pooled_differences_have_the_weights_of_fixed_or_of_random_effects():
    mean, low, high = pooled([(1.0, 1.0), (2.0, 2.0)])
    assert mean == pytest.approx(1.2) and low + high == pytest.approx(2.4)
    assert high - mean == pytest.approx(12.706 * 0.8**0.5, abs=1e-2)
    mean, _, high = pooled([(0.0, 0.1), (2.0, 0.1), (4.0, 0.1)])  # 4 is their variance
    assert mean == pytest.approx(2)
    assert high - mean == pytest.approx(4.303 * (4 / 3) ** 0.5, abs=1e-2)
