"""What a table says of recorded runs: means, intervals, and the text of its cells."""

import statistics
from collections.abc import Iterable

from lofit.run.arguments import find_task
from lofit.run.summary import mean
from lofit.studies.intervals import Groups, Scores, interval
from lofit.studies.records import Records, Run, unpack

NONE = "–"
ONE_RUN = "°"  # after an interval that lacks how runs vary


def metric_of(task: str) -> str:
    return find_task(task)[1].MAIN_METRIC


def scores_of(records: Records, runs: list[Run], metric: str = "") -> Scores:
    """A metric, the main one by default, of each item; all runs were tested on one task."""
    if runs and not metric:
        metric = metric_of(runs[0].tested or runs[0].task)
    return [unpack(records.of(run)["hits"][metric]) for run in runs]


def mean_items(runs: Scores) -> list[float]:
    """Each item's mean over the runs."""
    return [mean(list(each)) for each in zip(*runs, strict=True)]


def groups_of(records: Records, runs: list[Run]) -> Groups:
    """What the items of their test share, where it is recorded (clusters.py)."""
    return records.of(runs[0].base).get("clusters") if runs else None


def difference(ones: Scores, others: Scores, of_base: bool = False, groups: Groups = None) -> str:
    """ "+62.8 [+58.5, +67.1]": mean of `ones` less that of `others`, in percentage points. of_base:
    the others are the base model, which does not vary. groups: of the items."""
    if not ones or not others:
        return NONE
    found = mean(mean_items(ones)) - mean(mean_items(others))
    found, low, high = map(points, (found, *interval(ones, others, groups=groups)))
    return f"{found} [{low}, {high}]{mark(ones, [] if of_base else others)}"


def points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # 0.0 and not -0.0


def mark(*sides: Scores) -> str:
    return ONE_RUN if any(len(runs) == 1 for runs in sides) else ""


def score(records: Records, runs: list[Run]) -> str:
    """ "84.3% (+62.8 [+58.5, +67.1]): 85.8 85.0 82.2": the mean, its points above the base, each
    run's."""
    if not runs:
        return NONE
    scores = scores_of(records, runs)
    base, groups = scores_of(records, [runs[0].base]), groups_of(records, runs)
    gain = difference(scores, base, of_base=True, groups=groups)
    means = [mean(items) for items in scores]
    return f"{mean(means):.1%} ({gain}): {' '.join(f'{100 * each:.1f}' for each in means)}"


def spread(scores: Scores) -> str:
    """The standard deviation of the runs' means, in points."""
    means = [100 * mean(items) for items in scores]
    return f"{statistics.stdev(means):.1f}" if len(means) > 1 else NONE


def text_loss(losses: list[dict]) -> str:
    """ "4.194 → 4.377 [+0.141, +0.226]": the loss of a token before and after."""
    if not losses:
        return NONE
    base, tuned = [losses[0]["base"]], [each["tuned"] for each in losses]
    low, high = interval(tuned, base)
    before, after = mean(base[0]), mean(mean_items(tuned))
    return f"{before:.3f} → {after:.3f} [{low:+.3f}, {high:+.3f}]{mark(tuned)}"


def markdown(header: Iterable[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; a cell may hold several, separated as in the table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (header, *rows))
    return "\n".join([first, "| --- " * (first.count(" | ") + 1) + "|", *others])
