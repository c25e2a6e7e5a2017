"""What a table says of recorded runs: its rows, its columns, and the text of its cells."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from lofit.heads import rank_heads
from lofit.recipes import count_of
from lofit.run.summary import mean
from lofit.studies.cells import Pick
from lofit.studies.intervals import Difference, Scores, Spread, difference
from lofit.studies.records import Records, Run, unpack
from lofit.tasks import main_metric

NONE = "–"
ONE_RUN = "°"  # after an interval that lacks how runs vary


@dataclass
class Row:
    """A row of a table: what it says first, its runs, and those it is compared with. third: more
    runs that a column reads; metric: if it is not the task's main one."""

    labels: list[str]
    ours: Pick
    other: Pick | None
    third: Pick | None = None
    metric: str = ""

    @property
    def picks(self) -> list[Pick]:
        return [pick for pick in (self.ours, self.other, self.third) if pick]


def metric_of(run: Run) -> str:
    return main_metric(run.tested or run.task)


def scores_of(records: Records, runs: list[Run], metric: str = "") -> Scores:
    """A metric, the main one by default, of each item; all runs were tested on one task."""
    return [unpack(records.of(run)["hits"][metric or metric_of(run)]) for run in runs]


def means_of(records: Records, runs: list[Run], metric: str = "") -> list[float]:
    """Each run's score."""
    return [mean(items) for items in scores_of(records, runs, metric)]


def rule_scores(records: Records, run: Run) -> list[float]:
    """The items' scores by the cheap rule of the task that a run was tested on; [] without one."""
    found = records.of(run.base).get("rule_scores", {})
    return unpack(next(iter(found.values()))) if found else []


def compared(
    records: Records, ones: list[Run], others: list[Run] | None, metric: str = "",
    borrowed: Sequence[Spread | None] = (None, None),
) -> Difference:  # fmt: skip
    """others: empty for the base model, None for the cheap rule; neither varies."""
    base = ones[0].base
    ours = scores_of(records, ones, metric)
    if others is None:
        theirs = [rule_scores(records, ones[0])]
    else:
        theirs = scores_of(records, others or [base], metric)
    return difference(ours, theirs, records.of(base).get("clusters"), borrowed)


def ends(found: Difference, say: Callable[[float], str]) -> str:
    return "[{}, {}]".format(*map(say, found.interval()))


def points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # 0.0 and not -0.0


def said(found: Difference) -> str:
    """ "+62.8 [+58.5, +67.1]", in percentage points."""
    return f"{points(found.mean)} {ends(found, points)}"


class Cells:
    """The text of a row's cells, "" where nothing is recorded. ours, other, third: those of the
    row's runs whose test scores are."""

    def __init__(self, row: Row, records: Records):
        self.row, self.records, self.metric = row, records, row.metric
        self.ours, self.other, self.third = (
            [run for run in pick.runs(records) if records.done(run, "eval.py")] if pick else []
            for pick in (row.ours, row.other, row.third)
        )

    def means(self, runs: list[Run]) -> list[float]:
        return means_of(self.records, runs, self.metric)

    def mean(self, runs: list[Run]) -> str:
        return f"{100 * mean(self.means(runs)):.1f}" if runs else ""

    def score(self, runs: list[Run]) -> str:
        """ "84.3% (+62.8 [+58.5, +67.1]): 85.8 85.0 82.2": the mean, its points above the base,
        each run's."""
        each = " ".join(f"{100 * value:.1f}" for value in self.means(runs))
        return f"{self.mean(runs)}% ({self.gain(runs)}): {each}" if runs else ""

    def gain(self, runs: list[Run]) -> str:
        """Points above the base model."""
        found = compared(self.records, runs, [], self.metric) if runs else None
        return said(found) + ONE_RUN * (len(runs) == 1) if runs else ""

    def minus(self, ones: list[Run], others: list[Run]) -> str:
        if not ones or not others or ones == others:
            return ""
        single = min(len(ones), len(others)) == 1
        return said(compared(self.records, ones, others, self.metric)) + ONE_RUN * single

    def base(self, runs: list[Run], sign: str = "%") -> str:
        """The base model's score on what these runs were tested on."""
        of_base = [self.records.of(run)["base"][self.metric or metric_of(run)] for run in runs]
        return f"{100 * of_base[0]:.1f}{sign}" if runs else ""

    def always(self) -> str:
        """What one answer to all items would score."""
        found = self.records.of(self.row.ours.tried[0].base).get("always")
        return f"{100 * found['share']:.1f}" if found else ""

    def rule(self) -> list[float]:
        """The items' scores by the cheap rule, which are of the task's main metric."""
        other = self.ours and self.metric not in ("", metric_of(self.ours[0]))
        return rule_scores(self.records, self.ours[0]) if self.ours and not other else []

    def rule_score(self) -> str:
        return f"{100 * mean(self.rule()):.1f}" if self.rule() else ""

    def minus_rule(self) -> str:
        found = compared(self.records, self.ours, None, self.metric) if self.rule() else None
        return said(found) + ONE_RUN * (len(self.ours) == 1) if found else ""

    def where_rule(self, right: bool) -> str:
        """ "86.9 (311 items)": the mean of the items on which the cheap rule is right, or wrong."""
        chosen = [i for i, hit in enumerate(self.rule()) if (hit > 0) == right]
        if not chosen:
            return ""
        every = scores_of(self.records, self.ours, self.metric)
        found = mean([mean([items[i] for i in chosen]) for items in every])
        return f"{100 * found:.1f} ({len(chosen)} items)"

    def spread(self) -> str:
        """The standard deviation of the runs' means, in points."""
        means = [100 * value for value in self.means(self.ours)]
        return f"{statistics.stdev(means):.1f}" if len(means) > 1 else ""

    def values(self, runs: list[Run]) -> str:
        return f"{self.records.of(runs[0])['trained_values']:,}" if runs else ""

    def heads(self, runs: list[Run]) -> str:
        return str(n_heads(self.records.of(runs[0]))) if runs else ""

    def chosen(self) -> str:
        """The learning rate or strength of each run; and on which task's validation it was chosen,
        if it is another."""
        words, chooser = [], self.row.ours.tried[0].task
        for run in self.ours:
            if run.method == "lofit":
                words.append(f"lr{self.records.of(run)['settings']['lr']:.3g}")
            else:
                words.append("".join(run.train.split()[-2:]).removeprefix("--"))
        words += [f"(of {chooser})"] if any(run.task != chooser for run in self.ours) else []
        return " ".join(words)

    def text_loss(self) -> str:
        """ "4.194 → 4.377 [+0.141, +0.226]": the loss of a token before and after."""
        lines = map(self.records.of, self.row.third.runs(self.records))
        losses = [line["losses"] for line in lines if line]
        if not losses:
            return ""
        base, tuned = [losses[0]["base"]], [each["tuned"] for each in losses]
        before, after = mean(base[0]), mean([mean(each) for each in tuned])
        change = ends(difference(tuned, base), "{:+.3f}".format)
        return f"{before:.3f} → {after:.3f} {change}{ONE_RUN * (len(tuned) == 1)}"

    def grids(self, pick: Pick) -> list[torch.Tensor]:
        """Scores [layer, head] of each selection and fold."""
        of_model = self.records.grids(pick.tried[0].model)
        found = (of_model.get(run.title, []) for run in pick.runs(self.records))
        return [torch.tensor(grid) for folds in found for grid in folds]

    def k(self, grid: torch.Tensor) -> int:
        return count_of(self.row.labels[1], grid.numel(), "heads")

    def layers(self) -> list[int]:
        """Of the chosen heads."""
        grids = self.grids(self.row.ours)
        return [layer for grid in grids for layer, _ in rank_heads(grid, self.k(grid))]

    def mean_layer(self) -> str:
        layers = self.layers()
        return f"{mean(layers):.1f}" if layers else ""

    def span(self) -> str:
        layers = self.layers()
        return f"{min(layers)} to {max(layers)}" if layers else ""

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The scores of two selections, for two tasks, or two seeds or folds of one."""
        one, two = map(self.grids, (self.row.ours, self.row.other))
        same = self.row.other == self.row.ours
        return [*(itertools.combinations(one, 2) if same else itertools.product(one, two))]

    def shared(self) -> str:
        found = [in_common(one, two, self.k(one)) for one, two in self.pairs()]
        return f"{mean(found):.2f}" if found else ""

    def correlation(self) -> str:
        found = [spearman(*pair) for pair in self.pairs()]
        return f"{mean(found):.2f}" if found else ""


def n_heads(found: dict) -> int:
    """Of a recorded run; in one fold, where there are folds."""
    heads = found["heads"]
    return len(heads if isinstance(heads[0][0], int) else heads[0])


def in_common(one: torch.Tensor, two: torch.Tensor, k: int) -> float:
    """The share of the best k heads, of scores [layer, head]."""
    return len({*rank_heads(one, k)} & {*rank_heads(two, k)}) / k


def spearman(one: torch.Tensor, two: torch.Tensor) -> float:
    """The rank correlation of the heads' scores; equal scores share their mean rank."""
    both = [s.flatten().double() for s in (one, two)]
    ranks = [(s[:, None] > s).sum(1) + (s[:, None] >= s).sum(1) for s in both]
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].item()


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
