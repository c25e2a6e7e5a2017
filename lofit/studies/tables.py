"""What a table says of recorded runs: its rows, its columns, and the text of its cells."""

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from lofit.heads import rank_heads
from lofit.recipes import count_heads
from lofit.run.summary import mean
from lofit.studies.cells import Pick
from lofit.studies.intervals import Groups, Scores, interval
from lofit.studies.records import Records, Run, unpack
from lofit.tasks import main_metric

NONE = "–"
ONE_RUN = "°"  # after an interval that lacks how runs vary


@dataclass
class Row:
    """A row of a table: what it says first, its runs, and those it is compared with. others: more
    runs that a column reads; metric: if it is not the task's main one."""

    labels: list[str]
    picks: list[Pick]
    less: list[Pick]
    others: tuple[Pick, ...] = ()
    metric: str = ""


Column = Callable[[Row, Records], str]


def runs(picks: Iterable[Pick], records: Records) -> list[Run]:
    """Those whose test scores are recorded."""
    found = [pick.run(records) for pick in picks]
    return [run for run in found if run and records.done(run, "eval.py")]


def scores_of(records: Records, runs: list[Run], metric: str = "") -> Scores:
    """A metric, the main one by default, of each item; all runs were tested on one task."""
    if runs and not metric:
        metric = main_metric(runs[0].tested or runs[0].task)
    return [unpack(records.of(run)["hits"][metric]) for run in runs]


def mean_items(runs: Scores) -> list[float]:
    """Each item's mean over the runs."""
    return [mean(list(each)) for each in zip(*runs, strict=True)]


def groups_of(records: Records, runs: list[Run]) -> Groups:
    """What the items of their test share (MQuAKE's edits), where it is recorded."""
    return records.of(runs[0].base).get("clusters") if runs else None


def between(
    ones: Scores, others: Scores, say: Callable[[float], str], of_base: bool = False,
    groups: Groups = None,
) -> str:  # fmt: skip
    """ "[+58.5, +67.1]": the interval of the mean of `ones` less that of `others`. of_base: the
    others are the base model, which does not vary; groups: of the items."""
    low, high = map(say, interval(ones, others, groups=groups))
    one_run = len(ones) == 1 or (len(others) == 1 and not of_base)
    return f"[{low}, {high}]{ONE_RUN if one_run else ''}"


def difference(ones: Scores, others: Scores, of_base: bool = False, groups: Groups = None) -> str:
    """ "+62.8 [+58.5, +67.1]", in percentage points."""
    if not ones or not others:
        return NONE
    found = mean(mean_items(ones)) - mean(mean_items(others))
    return f"{points(found)} {between(ones, others, points, of_base, groups)}"


def points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # 0.0 and not -0.0


def score(row: Row, records: Records, part: str = "picks") -> str:
    """ "84.3% (+62.8 [+58.5, +67.1]): 85.8 85.0 82.2": the mean, its points above the base, each
    run's."""
    done = runs(getattr(row, part), records)
    if not done:
        return NONE
    scores = scores_of(records, done)
    base = scores_of(records, [done[0].base])
    gain = difference(scores, base, True, groups_of(records, done))
    means = [mean(items) for items in scores]
    return f"{mean(means):.1%} ({gain}): {' '.join(f'{100 * each:.1f}' for each in means)}"


def score_of_less(row: Row, records: Records) -> str:
    return score(row, records, "less")


def minus(ones: str, others: str) -> Column:
    """A column with the difference of two of the row's `picks`, `less` and `others`."""

    def column(row: Row, records: Records) -> str:
        both = [list(getattr(row, part)) for part in (ones, others)]
        if both[0] == both[1]:
            return NONE
        done = [runs(picks, records) for picks in both]
        scores = (scores_of(records, part, row.metric) for part in done)
        return difference(*scores, groups=groups_of(records, done[0]))

    return column


def gain(row: Row, records: Records) -> str:
    done = runs(row.picks, records)
    base = scores_of(records, [done[0].base], row.metric) if done else []
    scores = scores_of(records, done, row.metric)
    return difference(scores, base, True, groups_of(records, done))


def mean_of(part: str) -> Column:
    """A column with the mean score of the row's `picks`, `less` or `others`."""

    def column(row: Row, records: Records) -> str:
        scores = scores_of(records, runs(getattr(row, part), records), row.metric)
        return f"{100 * mean(mean_items(scores)):.1f}" if scores else NONE

    return column


def base_mean(row: Row, records: Records) -> str:
    """Of the base model, which may be recorded before any run is."""
    every = [pick.tried[0].base for pick in (*row.picks, *row.less, *row.others)]
    found = [records.of(run)["base"] for run in every if records.of(run)]
    metric = row.metric or main_metric(every[0].task)
    return f"{100 * found[0][metric]:.1f}" if found else NONE


def always(row: Row, records: Records) -> str:
    """What one answer to all items would score."""
    found = records.of(row.picks[0].tried[0].base).get("always")
    return f"{100 * found['share']:.1f}" if found else NONE


def spread(row: Row, records: Records) -> str:
    """The standard deviation of the runs' means, in points."""
    scores = scores_of(records, runs(row.picks, records))
    means = [100 * mean(items) for items in scores]
    return f"{statistics.stdev(means):.1f}" if len(means) > 1 else NONE


def text_loss(row: Row, records: Records) -> str:
    """ "4.194 → 4.377 [+0.141, +0.226]": the loss of a token before and after."""
    found = [records.of(run) for pick in row.others if (run := pick.run(records))]
    losses = [line["losses"] for line in found if line]
    if not losses:
        return NONE
    base, tuned = [losses[0]["base"]], [each["tuned"] for each in losses]
    before, after = mean(base[0]), mean(mean_items(tuned))
    return f"{before:.3f} → {after:.3f} {between(tuned, base, '{:+.3f}'.format, of_base=True)}"


def of_one(say: Callable[[Run, dict], str], also_less: bool = False) -> Column:
    """A column that says something of one recorded run of the row; also_less: or, where there is
    none, of one that it is compared with."""

    def column(row: Row, records: Records) -> str:
        done = runs([*row.picks, *(row.less if also_less else [])], records)
        return say(done[0], records.of(done[0])) if done else NONE

    return column


def base(run: Run, found: dict) -> str:
    return f"{found['base'][main_metric(run.tested or run.task)]:.1%}"


def values(run: Run, found: dict) -> str:
    return f"{found['trained_values']:,}"


def n_heads(run: Run, found: dict) -> str:
    """In one fold, where there are folds."""
    heads = found["heads"]
    return str(len(heads if isinstance(heads[0][0], int) else heads[0]))


def seconds(row: Row, records: Records) -> str:
    """Of one selection, if any, and one training: the quickest."""
    done = runs(row.picks, records)
    select = [records.of(run.selection).get("seconds", {}) for run in done]
    train = [records.of(run)["seconds"]["train.py"] for run in done]
    both = [t + s.get("select_heads.py", 0) for s, t in zip(select, train, strict=True)]
    return f"{min(both):.0f}" if both else NONE


def chosen(row: Row, records: Records) -> str:
    """What was chosen on validation, for each run; and on which task's, if it is another."""
    found = []
    done = runs(row.picks, records)
    for run in done:
        if run.method == "lofit":
            lr = records.of(run)["settings"]["lr"]
            found.append("recipe" if run.lr_factor == 1 else f"lr{lr:.3g}")
        else:
            found.append("".join(run.train.split()[-2:]).removeprefix("--"))
    chooser = row.picks[0].tried[0].task
    if any(run.task != chooser for run in done):
        found.append(f"(of {chooser})")
    return " ".join(found) or NONE


def grids(picks: list[Pick], records: Records) -> list[torch.Tensor]:
    """Scores [layer, head] of each selection and fold."""
    found = [pick.run(records) for pick in picks]
    return [torch.tensor(g) for run in found for g in records.grids(run.model).get(run.title, [])]


def layers(row: Row, records: Records) -> str:
    """Mean and range of the chosen heads' layers."""
    found = grids(row.picks, records)
    chosen = [layer for grid in found for layer, _ in rank_heads(grid, k_of(row, grid))]
    return f"{mean(chosen):.1f} | {min(chosen)} to {max(chosen)}" if chosen else f"{NONE} | {NONE}"


def shared(row: Row, records: Records) -> str:
    """What two selections share: of two tasks, or two seeds or folds of one."""
    one, two = (grids(picks, records) for picks in (row.picks, row.less))
    pairs = itertools.combinations(one, 2) if row.less == row.picks else itertools.product(one, two)
    found = [agreement(*pair, k_of(row, one[0])) for pair in pairs]
    means = [f"{mean(list(each)):.2f}" for each in zip(*found, strict=True)]
    return " | ".join(means or [NONE, NONE])


def k_of(row: Row, grid: torch.Tensor) -> int:
    shape = SimpleNamespace(num_hidden_layers=len(grid), num_attention_heads=len(grid[0]))
    return count_heads(row.labels[1], shape)


def agreement(one: torch.Tensor, two: torch.Tensor, k: int) -> tuple[float, float]:
    """(share of the best k heads in common, Spearman's correlation) of scores [layer, head]."""
    shared = len({*rank_heads(one, k)} & {*rank_heads(two, k)}) / k
    ranks = torch.stack([s.flatten().double().argsort().argsort().double() for s in (one, two)])
    return shared, torch.corrcoef(ranks)[0, 1].item()


def markdown(header: Iterable[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; a cell may hold several, separated as in the table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (header, *rows))
    return "\n".join([first, "| --- " * (first.count(" | ") + 1) + "|", *others])
