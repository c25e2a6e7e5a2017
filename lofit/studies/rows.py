"""A row of a table: its runs, the calls that they lack, and what its columns say of them."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from lofit.heads import rank_heads
from lofit.recipes import count_heads
from lofit.run.arguments import find_task
from lofit.run.summary import mean
from lofit.studies import tables
from lofit.studies.records import Records, Run
from lofit.studies.runner import TEXT_LOSS, Call

NONE = tables.NONE
SCRIPTS = {
    "select": ["select_heads.py"],
    "train": ["train.py", "eval.py"],
    "asked": ["eval.py"],
    "text": [TEXT_LOSS],
}


@dataclass(frozen=True)
class Pick:
    """For one seed the run that did best on validation with the first seed, of those tried; as it
    is (kind "train"), or tested on another task or text. task: what it is trained on, where
    another task's validation chose."""

    tried: tuple[Run, ...]
    seed: int
    kind: str = "train"
    tested: str = ""
    task: str = ""

    def run(self, records: Records, kind: str = "") -> Run | None:
        """None before all that is tried is recorded. Of equal scores the first."""
        best = self.tried[0]
        if len(self.tried) > 1:
            if not all(records.done(run, "train.py") for run in self.tried):
                return None
            best = max(self.tried, key=lambda run: validation(records, run))
        best = replace(best, task=self.task or best.task)
        if "train" == (kind or self.kind):
            return replace(best, seed=self.seed)
        return replace(best, seed=self.seed, kind=self.kind, tested=self.tested)

    def missing(self, records: Records) -> list[Call]:
        """The calls that are not recorded, as far as the records say which they are."""
        run = self.run(records)
        if run is None:
            return [Call(r, "train.py") for r in self.tried if not records.done(r, "train.py")]
        return [Call(run, s) for s in SCRIPTS[self.kind] if not records.done(run, s)]


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


def validation(records: Records, run: Run) -> float:
    """The score that train.py recorded; of a task in folds their mean."""
    found, metric = records.of(run)["val"], tables.metric_of(run.task)
    return mean([val[metric] for val in (found if isinstance(found, list) else [found])])


def runs(picks: Iterable[Pick], records: Records) -> list[Run]:
    """Those whose test scores are recorded."""
    found = [pick.run(records) for pick in picks]
    return [run for run in found if run and records.done(run, "eval.py")]


def score(row: Row, records: Records) -> str:
    return tables.score(records, runs(row.picks, records))


def score_of_less(row: Row, records: Records) -> str:
    return tables.score(records, runs(row.less, records))


def difference(row: Row, records: Records) -> str:
    return NONE if row.less == row.picks else _between(row, row.picks, row.less, records)


def less_others(row: Row, records: Records) -> str:
    return _between(row, row.picks, row.others, records)


def _between(row: Row, ones: Iterable[Pick], others: Iterable[Pick], records: Records) -> str:
    done = [runs(part, records) for part in (ones, others)]
    both = (tables.scores_of(records, part, row.metric) for part in done)
    return tables.difference(*both, groups=tables.groups_of(records, done[0]))


def gain(row: Row, records: Records) -> str:
    done = runs(row.picks, records)
    base = tables.scores_of(records, [done[0].base], row.metric) if done else []
    scores = tables.scores_of(records, done, row.metric)
    return tables.difference(scores, base, True, tables.groups_of(records, done))


def mean_of(part: str) -> Column:
    """A column with the mean score of the row's `picks`, `less` or `others`."""

    def column(row: Row, records: Records) -> str:
        scores = tables.scores_of(records, runs(getattr(row, part), records), row.metric)
        return f"{100 * mean(tables.mean_items(scores)):.1f}" if scores else NONE

    return column


def base_mean(row: Row, records: Records) -> str:
    """Of the base model, which may be recorded before any run is."""
    every = [pick.tried[0].base for pick in (*row.picks, *row.less, *row.others)]
    found = [records.of(run)["base"] for run in every if records.of(run)]
    metric = row.metric or tables.metric_of(every[0].task)
    return f"{100 * found[0][metric]:.1f}" if found else NONE


def always(row: Row, records: Records) -> str:
    """What one answer to all items would score."""
    found = records.of(row.picks[0].tried[0].base).get("always")
    return f"{100 * found['share']:.1f}" if found else NONE


def spread(row: Row, records: Records) -> str:
    return tables.spread(tables.scores_of(records, runs(row.picks, records)))


def text_loss(row: Row, records: Records) -> str:
    found = [records.of(run) for pick in row.others if (run := pick.run(records))]
    return tables.text_loss([line["losses"] for line in found if line])


def of_one(say: Callable[[Run, dict], str], also_less: bool = False) -> Column:
    """A column that says something of one recorded run of the row; also_less: or, where there is
    none, of one that it is compared with."""

    def column(row: Row, records: Records) -> str:
        done = runs([*row.picks, *(row.less if also_less else [])], records)
        return say(done[0], records.of(done[0])) if done else NONE

    return column


def base(run: Run, found: dict) -> str:
    return f"{found['base'][tables.metric_of(run.tested or run.task)]:.1%}"


def values(run: Run, found: dict) -> str:
    return f"{found['trained_values']:,}"


def n_heads(run: Run, found: dict) -> str:
    """In one fold, where there are folds."""
    return str(len(found["heads"][0] if find_task(run.task)[1].FOLDS else found["heads"]))


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
    return [torch.tensor(g) for pick in picks for g in records.grids(pick.run(records))]


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
