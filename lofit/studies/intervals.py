"""Intervals of a difference of mean scores, over items and runs together.

A score varies for three reasons: the items that happen to be in the test set, the run (its seed,
its draw of heads), and what is left, one run on one item. Variance over items holds the first and
the last; that of the runs is estimated without the last (a two-way layout without repetition, as in
Searle, Casella and McCulloch, Variance Components, 1992). Runs are few, so that a bootstrap over
them is too narrow: they have the t quantile of Welch's degrees of freedom, items their own, and
the sum has the mean of both quantiles, weighted by the variances (Cochran, Biometrics 20, 1964).

Items that share something, like MQuAKE's questions about one edit, CLUTRR's stories with one chain
of relations, which have one answer, or TruthfulQA's questions of one category, are right or wrong
together: with groups it is these that vary. The variance is then that of sums over groups, each
corrected for its own share in the mean (CR2 of Bell and McCaffrey, Survey Methodology 28, 2002); of
groups of one item it is the ordinary one. Its degrees of freedom are the groups less one: more than
theirs where groups are unequal, but few enough (tests/measure/interval_coverage.py).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Scores = list[list[float]]  # [run][item], the same items everywhere
Groups = Sequence[int] | None  # of each item, the number of its group; None: all are apart


@dataclass(frozen=True)
class Spread:
    """An estimated variance and its degrees of freedom."""

    variance: float
    df: float


@dataclass(frozen=True)
class Difference:
    """A difference of two means: its value, and how it varies with the items and with the runs."""

    mean: float
    items: Spread
    runs: Spread

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(self.items.variance + self.runs.variance)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        parts = [part for part in (self.items, self.runs) if part.variance]
        quantiles = sum(t_quantile(part.df, level) * part.variance for part in parts)
        half = quantiles / self.error if quantiles else 0.0
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """One less the level of the interval that ends at 0."""
        if not self.error:
            return math.nan if self.mean else 1.0
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            ends = self.interval(middle)
            low, high = (low, middle) if ends[0] <= 0 <= ends[1] else (middle, high)
        return 1 - high


def difference(
    ones: Scores,
    others: Scores,
    groups: Groups = None,
    borrowed: Sequence[Spread | None] = (None, None),
) -> Difference:
    """The mean of `ones` less that of `others`.

    The runs of the two are drawn independently; the items are the same, and are compared in pairs.
    A side of one run says nothing of how runs vary: the interval then holds for that very run,
    unless the spread of one run is borrowed for this side (`run_spread` of others like it). The
    base model is one run that does not vary. There must be two items or groups.
    """
    sides = [torch.as_tensor(s, dtype=torch.float64) for s in (ones, others)]
    means = [side.mean(0) for side in sides]
    differences = means[0] - means[1]
    groups = _groups(groups, len(differences))
    # summed as the score of a table is, so that both round alike
    one, other = (sum(each.tolist()) / len(each) for each in means)
    mean = one - other
    items = Spread(_of_sums(differences - mean, groups), int(groups.max()))
    parts = [
        _of_runs(side, groups) if len(side) > 1 else spread
        for side, spread in zip(sides, borrowed, strict=True)
    ]
    return Difference(mean, items, _sum([part for part in parts if part]))


def run_spread(cells: Iterable[tuple[Scores, Groups]]) -> Spread:
    """How single runs vary about their cell's mean, over cells of several runs that differ by the
    seed alone, each with the groups of its items. Where one cell has most of the variance, it has
    hardly more degrees of freedom than this cell (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    sides = [(torch.as_tensor(scores, dtype=torch.float64), groups) for scores, groups in cells]
    parts = [(len(side), _of_runs(side, _groups(groups, side.shape[1]))) for side, groups in sides]
    df = sum(part.df for _, part in parts)
    return _sum([Spread(n * part.variance * part.df / df, part.df) for n, part in parts])


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979), in the order given."""
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = worst
    return corrected


def pooled(found: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(mean, low, high) of several differences, two at least, each (mean, standard error).

    Random effects: what they differ by beyond their errors is estimated (DerSimonian and Laird,
    1986), and the interval has the t quantile of their number, with an error that is not below that
    of fixed effects (Knapp and Hartung, 2003).
    """
    means, errors = torch.tensor(found, dtype=torch.float64).T
    df, weights = len(found) - 1, errors**-2
    fixed = (weights * means).sum() / weights.sum()
    excess = (weights * (means - fixed) ** 2).sum() - df
    between = max(0.0, (excess / (weights.sum() - (weights**2).sum() / weights.sum())).item())
    weights = 1 / (errors**2 + between)
    mean = (weights * means).sum() / weights.sum()
    scale = max(1.0, ((weights * (means - mean) ** 2).sum() / df).item())
    half = t_quantile(df) * math.sqrt(scale / weights.sum().item())
    return mean.item(), mean.item() - half, mean.item() + half


def _groups(groups: Groups, n: int) -> torch.Tensor:
    """The groups of n items as numbers from 0."""
    every = torch.arange(n) if groups is None else torch.as_tensor(groups)
    return every.unique(return_inverse=True)[1]


def _of_sums(left: torch.Tensor, groups: torch.Tensor) -> float:
    """The variance of the mean of items by group, from each item's deviation."""
    sizes, n = groups.bincount(), len(groups)
    sums = torch.zeros(len(sizes), dtype=left.dtype).index_add_(0, groups, left)
    return (sums.square() / (1 - sizes / n)).sum().item() / n**2


def _of_runs(scores: torch.Tensor, groups: torch.Tensor) -> Spread:
    """The variance of the mean over runs, without what single items or groups add to it, at least
    0, of scores [run, item]."""
    runs, means = len(scores), scores.mean(1)
    left = scores - means[:, None] - scores.mean(0) + scores.mean()
    of_items = sum(_of_sums(each, groups) for each in left) / (runs - 1)
    return Spread(max(means.var().item() - of_items, 0.0) / runs, runs - 1)


def _sum(parts: list[Spread]) -> Spread:
    """The variance of a sum, with Welch's degrees of freedom."""
    variance = sum(part.variance for part in parts)
    if not variance:
        return Spread(0.0, 1)
    return Spread(variance, variance**2 / sum(part.variance**2 / part.df for part in parts))


def t_quantile(df: float, level: float = 0.95) -> float:
    """t with `level` of Student's distribution between -t and t. With t = sqrt(df) tan(a) its
    density over a is that of cos(a)^(df - 1), and all of it lies below a few times 1 / sqrt(df)."""
    end = min(math.pi / 2, 40 / math.sqrt(df))
    # small steps: between one and two degrees of freedom the density falls steeply at the end
    angle = torch.linspace(0, end, 100_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (df - 1), angle)
    i = int(torch.searchsorted(mass, level * mass[-1]))
    before = mass[i - 1].item() if i else 0.0
    share = (level * mass[-1].item() - before) / (mass[i].item() - before)
    return math.sqrt(df) * math.tan((angle[i] + share * (angle[i + 1] - angle[i])).item())
