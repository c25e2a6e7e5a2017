"""What each study compares: the rows of its table, and the runs that a row needs."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
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
DRAWN = ("random", "spread")  # ways of choosing that draw heads
WAYS = ["scales", "gradient", "gates", "probe", *DRAWN]
# of train.py --method: the flag, and what is tried on validation
BASELINES = {
    "lora": ("--lr", ["1e-4", "5e-4", "2e-3"]),
    "red": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "bias": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "iti": ("--alpha", ["5", "15", "30"]),
    "repe": ("--alpha", ["0.5", "2", "8"]),
}


@dataclass(frozen=True)
class Pick:
    """For one seed the run that did best on validation with the first seed, of those tried; as it
    is (kind "train"), or tested on another task or text."""

    tried: tuple[Run, ...]
    seed: int
    kind: str = "train"
    tested: str = ""

    def run(self, records: Records, kind: str = "") -> Run | None:
        """None before all that is tried is recorded. Of equal scores the first."""
        best = self.tried[0]
        if len(self.tried) > 1:
            if not all(records.done(run, "train.py") for run in self.tried):
                return None
            best = max(self.tried, key=lambda run: validation(records, run))
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
    """A row of a table: what it says first, its runs, and those it is compared with."""

    labels: list[str]
    picks: list[Pick]
    less: list[Pick]
    texts: tuple[Pick, ...] = ()


Column = Callable[[Row, Records], str]


@dataclass(frozen=True)
class Study:
    """about: the table's caption, with arguments' names in braces. columns: after the labels."""

    about: str
    labels: list[str]
    columns: dict[str, Column]
    rows: Callable[[argparse.Namespace], Iterable[Row]]
    arguments: dict[str, dict]

    def table(self, rows: Iterable[Row], records: Records) -> list[list[str]]:
        """The rows of which something is recorded."""
        cells = [(row, [say(row, records) for say in self.columns.values()]) for row in rows]
        return [[*row.labels, *found] for row, found in cells if "".join(found).strip(f"{NONE} |")]


def validation(records: Records, run: Run) -> float:
    """The score that train.py recorded; of a task in folds their mean."""
    found, metric = records.of(run)["val"], tables.metric_of(run.task)
    return mean([val[metric] for val in (found if isinstance(found, list) else [found])])


# Runs


def lofit(args, model, task, by, k, seeds=None, more="", heads_of="") -> list[Pick]:
    """Offsets on K heads that a way chose, for each seed; more: flags of both steps."""
    seeds = seeds or args.seeds
    by = "all" if k == "all" else by
    select = "" if by in ("all", "random") else f"{more} {args.select_flags}".strip()
    first = Run("train", model, task, args.data, seeds[0], args.dtype, "lofit", by, k, heads_of)
    first = replace(first, select=select, train=f"{more} {args.train_flags}".strip())
    tried = tuple(replace(first, lr_factor=factor) for factor in args.lr_factors)
    return [Pick(tried, seed) for seed in seeds]


def method(args, model, task, name, more="") -> list[Pick]:
    """ "lofit K", or a baseline with each strength or learning rate, for each seed."""
    if name.startswith("lofit "):
        return lofit(args, model, task, "scales", name.split()[1], more=more)
    flag, values = BASELINES[name]
    first = Run("train", model, task, args.data, args.seeds[0], args.dtype, name)
    flags = f"{more} {args.train_flags}".strip()
    tried = tuple(replace(first, train=f"{flags} {flag} {value}".strip()) for value in values)
    return [Pick(tried, seed) for seed in args.seeds]


def known_method(text: str) -> str:
    """For argparse."""
    if text not in BASELINES and not text.startswith("lofit "):
        raise argparse.ArgumentTypeError(f'{text}: expected "lofit K", {", ".join(BASELINES)}')
    return text


def tested_on(task: str, picks: list[Pick], kind: str = "asked") -> list[Pick]:
    return [replace(pick, kind=kind, tested=task) for pick in picks]


# Rows


def names(model: str, task: str) -> list[str]:
    return [Path(model).name, f"{task} ({tables.metric_of(task)})"]


def sweep_rows(args) -> Iterable[Row]:
    for model, task, k in itertools.product(args.model, args.task, args.heads):
        drawn = [] if k == "all" else lofit(args, model, task, "random", k)
        yield Row(names(model, task), lofit(args, model, task, args.by, k), drawn)


def heads_rows(args) -> Iterable[Row]:
    draws = [args.seeds[0] + i for i in range(args.draws)]
    for model, task, k in itertools.product(args.model, args.task, args.heads):
        seeds = {way: draws if way in DRAWN else None for way in args.by}
        picks = {way: lofit(args, model, task, way, k, seeds[way]) for way in args.by}
        for way in args.by:
            yield Row([*names(model, task), k, way], picks[way], picks.get("random", []))


def methods_rows(args) -> Iterable[Row]:
    every = [*(f"lofit {k}" for k in args.heads), *args.methods]
    for model, task in itertools.product(args.model, args.task):
        picks = {name: method(args, model, task, name) for name in every}
        for name in every:
            yield Row([*names(model, task), name], picks[name], picks[every[0]])


def data_rows(args) -> Iterable[Row]:
    for model, task, n in itertools.product(args.model, args.task, args.examples):
        more = "" if n == "all" else f"--n-train {n}"
        picks = {name: method(args, model, task, name, more) for name in args.methods}
        for name in args.methods:
            yield Row([*names(model, task), n, name], picks[name], picks[args.methods[0]])


def transfer_rows(args) -> Iterable[Row]:
    for model, task, source in itertools.product(args.model, args.task, args.task):
        labels, own = names(model, task), lofit(args, model, task, args.by, args.heads)
        if task == source:
            yield Row([*labels, "heads", source], own, own)
        elif task in (args.tested or args.task):
            taken = lofit(args, model, task, args.by, args.heads, heads_of=source)
            yield Row([*labels, "heads", source], taken, own)
            theirs = lofit(args, model, source, args.by, args.heads)
            yield Row([*labels, "offsets", source], tested_on(task, theirs), own)


def forgets_rows(args) -> Iterable[Row]:
    tuned = [task for task in args.task if task in (args.tuned or args.task)]
    for model, task, name in itertools.product(args.model, tuned, args.methods):
        for other in [other for other in args.task if other != task]:
            picks = method(args, model, task, name)
            first = tested_on(other, method(args, model, task, args.methods[0]))
            texts = tuple(tested_on(args.text or other, picks, "text"))
            labels = [Path(model).name, task, name, names(model, other)[1]]
            yield Row(labels, tested_on(other, picks), first, texts)


def layers_rows(args) -> Iterable[Row]:
    for model, task, other in itertools.product(args.model, args.task, args.task):
        both = [lofit(args, model, name, args.by, args.heads) for name in (task, other)]
        both = [[Pick((p.tried[0].selection,), p.seed, "select") for p in part] for part in both]
        yield Row([Path(model).name, args.heads, task, other], *both)


# Columns


def runs(picks: Iterable[Pick], records: Records) -> list[Run]:
    """Those whose test scores are recorded."""
    found = [pick.run(records) for pick in picks]
    return [run for run in found if run and records.done(run, "eval.py")]


def score(row: Row, records: Records) -> str:
    return tables.score(records, runs(row.picks, records))


def score_of_less(row: Row, records: Records) -> str:
    return tables.score(records, runs(row.less, records))


def difference(row: Row, records: Records) -> str:
    if row.less == row.picks:
        return NONE
    both = (tables.scores_of(records, runs(part, records)) for part in (row.picks, row.less))
    return tables.difference(*both)


def gain(row: Row, records: Records) -> str:
    done = runs(row.picks, records)
    base = tables.scores_of(records, [done[0].base]) if done else []
    return tables.difference(tables.scores_of(records, done), base, of_base=True)


def spread(row: Row, records: Records) -> str:
    return tables.spread(tables.scores_of(records, runs(row.picks, records)))


def text_loss(row: Row, records: Records) -> str:
    found = [records.of(run) for pick in row.texts if (run := pick.run(records))]
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
    """What was chosen on validation, for each run."""
    found = []
    for run in runs(row.picks, records):
        if run.method == "lofit":
            lr = records.of(run)["settings"]["lr"]
            found.append("recipe" if run.lr_factor == 1 else f"lr{lr:.3g}")
        else:
            found.append("".join(run.train.split()[-2:]).removeprefix("--"))
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


# Studies

SCORE = "mean score, points above the base [95 % interval], each run of the seeds {seeds}"
LR = "the learning rate is the first seed's best on validation, of {lr_factors} times the recipe's"
HEADS = {"default": "10%", "help": "how many heads (default: 10%%)"}
BY = {"default": "scales", "help": "the way of choosing heads"}
METHODS = {"nargs": "+", "type": known_method, "help": f'"lofit K", {", ".join(BASELINES)}'}
STUDIES = {
    "sweep": Study(
        f"Chosen heads beside as many random ones, test split. Heads by {{by}}: {SCORE}",
        ["model", "task"],
        {"base": of_one(base, True), "heads": of_one(n_heads, True),
         "values": of_one(values, True), "LoFiT": score, "random heads": score_of_less,
         "LoFiT − random": difference},
        sweep_rows,
        {"--heads": {"nargs": "+", "default": ["10%", "3%"]}, "--by": BY},
    ),
    "heads": Study(
        f"Does it matter which heads? Test split: {SCORE}, or of {{draws}} seeds where heads are"
        f" drawn; less random draws; ± runs: standard deviation of the runs, in points; {LR}",
        ["model", "task", "heads", "chosen by"],
        {"score": score, "less random": difference, "± runs": spread, "lr": chosen},
        heads_rows,
        {"--heads": {"nargs": "+", "default": ["1%", "3%", "10%", "30%"]},
         "--by": {"nargs": "+", "default": WAYS}, "--draws": {"type": int, "default": 5}},
    ),
    "methods": Study(
        f"LoFiT beside baselines, test split: {SCORE}; less the first row's; the learning rate (of"
        " iti and repe the strength) is the first seed's best on validation; seconds: one selection"
        " and one training",
        ["model", "task", "method"],
        {"values": of_one(values), "seconds": seconds, "score": score, "less LoFiT": difference,
         "chosen": chosen},
        methods_rows,
        {"--heads": {"nargs": "+", "default": ["10%", "3%", "all"], "help": "of LoFiT"},
         "--methods": {"nargs": "*", "default": list(BASELINES), "choices": list(BASELINES)}},
    ),
    "data": Study(
        f"How many examples does it take? Test split: {SCORE}; less the first method's. Heads are"
        " selected for each number of examples, and a learning rate is chosen on the whole"
        " validation split with the first seed",
        ["model", "task", "examples", "method"],
        {"score": score, "less {methods[0]}": difference, "chosen": chosen},
        data_rows,
        {"--examples": {"nargs": "+", "default": ["10", "25", "50", "100", "all"]},
         "--methods": METHODS | {"default": ["lofit 10%", "lora", "red"]}},
    ),
    "transfer": Study(
        f"Do heads and offsets of one task serve another? Test split, {{heads}} of heads: {SCORE};"
        " less the task's own. Heads: chosen on one task, offsets trained on another. Offsets:"
        " trained on one task, tested on another",
        ["model", "tested on", "what", "from"],
        {"score": score, "less own": difference},
        transfer_rows,
        {"--heads": HEADS, "--by": BY, "--tested": {"nargs": "+", "help": "tasks (default: all)"}},
    ),
    "forgets": Study(
        "What does tuning on one task cost elsewhere? Test split, seeds {seeds}: change of another"
        " task's score in points [95 % interval], less the first method's, and the loss of a token"
        " of text (the other task's prompts, or --text) before and after [interval of the"
        " difference]",
        ["model", "tuned on", "by", "asked"],
        {"base": of_one(base), "change": gain, "less {methods[0]}": difference,
         "loss of text": text_loss},
        forgets_rows,
        {"--methods": METHODS | {"default": ["lofit 3%", "lofit 10%", "lofit all", "lora", "red"]},
         "--tuned": {"nargs": "+", "help": "tasks (default: all)"},
         "--text": {"help": "a file of plain text instead of prompts, one text a line"}},
    ),
    "layers": Study(
        "Where do the chosen heads sit? {heads} of heads by {by}, seeds {seeds}: layers as mean and"
        " range; the share of heads that two selections have in common (of one task: two seeds or"
        " folds; by chance {heads}), and the rank correlation of all heads' scores",
        ["model", "heads", "task", "beside"],
        {"mean layer | layers": layers, "shared | correlation": shared},
        layers_rows,
        {"--heads": HEADS, "--by": BY},
    ),
}  # fmt: skip
