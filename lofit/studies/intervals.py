"""Intervals of a difference of mean scores, over items and runs together.

A score varies for three reasons: the items that happen to be in the test set, the run (its seed,
its draw of heads), and what is left, one run on one item. Variance over items holds the first and
the last; that of the runs is estimated without the last (a two-way layout without repetition, as in
Searle, Casella and McCulloch, Variance Components, 1992). Runs are few, so that a bootstrap over
them is too narrow: they have the t quantile of Welch's degrees of freedom, items their own, and
the sum has the mean of both quantiles, weighted by the variances (Cochran, Biometrics 20, 1964).
"""

import math

import torch

Scores = list[list[float]]  # [run][item], the same items everywhere


def interval(ones: Scores, others: Scores, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of `ones` less that of `others`.

    The runs of the two are drawn independently; the items are the same, and are compared in pairs.
    A side of one run says nothing of how runs vary: the interval then holds for that very run. The
    base model is one run that does not vary. NaN with less than two items.
    """
    one, other = (torch.as_tensor(s, dtype=torch.float64) for s in (ones, others))
    differences = one.mean(0) - other.mean(0)
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    items = differences.var().item() / n  # with what one run does on one item
    parts = [_of_runs(side) for side in (one, other) if len(side) > 1]
    runs = sum(variance for variance, _ in parts)
    quantiles = t_quantile(n - 1, level) * items
    if runs:
        df = runs**2 / sum(variance**2 / df for variance, df in parts)
        quantiles += t_quantile(df, level) * runs
    half = quantiles / math.sqrt(runs + items) if runs + items else 0.0
    middle = differences.mean().item()
    return middle - half, middle + half


def _of_runs(scores: torch.Tensor) -> tuple[float, int]:
    """(variance of the mean over runs, without what single items add to it, at least 0; its degrees
    of freedom) of scores [run, item]."""
    runs, n = scores.shape
    means = scores.mean(1)
    left = scores - means[:, None] - scores.mean(0) + scores.mean()
    left_variance = left.square().sum().item() / ((runs - 1) * (n - 1))
    return max(means.var().item() - left_variance / n, 0.0) / runs, runs - 1


def t_quantile(df: float, level: float = 0.95) -> float:
    """t with `level` of Student's distribution between -t and t. With t = sqrt(df) tan(a) its
    density over a is that of cos(a)^(df - 1), and all of it lies below a few times 1 / sqrt(df)."""
    end = min(math.pi / 2, 40 / math.sqrt(df))
    angle = torch.linspace(0, end, 4001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (df - 1), angle)
    i = int(torch.searchsorted(mass, level * mass[-1]))
    before = mass[i - 1].item() if i else 0.0
    share = (level * mass[-1].item() - before) / (mass[i].item() - before)
    return math.sqrt(df) * math.tan((angle[i] + share * (angle[i + 1] - angle[i])).item())
