"""What each study compares: the rows of its table, and the runs that a row needs."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lofit.run.arguments import natural
from lofit.studies.cells import Pick
from lofit.studies.records import Records, Run
from lofit.studies.tables import NONE, Cells, Row
from lofit.tasks import find_tasks, main_metric

DRAWN = ("random", "spread")  # ways of choosing that draw heads; the second is only recorded
OURS = {"lofit": "scales", "random": "random"}  # methods that train offsets on K heads
# of train.py --method: the flag, as the records have it (--alpha is --strength), and what is tried
BASELINES = {
    "lora": ("--lr", ["1e-4", "5e-4", "2e-3"]),
    "lora_rank1": ("--lr", ["2e-3", "1e-2", "5e-2"]),
    "red": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "bias": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "post_block": ("--lr", ["5e-3", "2e-2", "8e-2"]),
    "iti": ("--alpha", ["5", "15", "30"]),
    "repe": ("--alpha", ["0.5", "2", "8"]),
}
# baselines that may have K layers instead of all
LAYERED = ("lora", "lora_rank1", "red", "bias", "post_block")
MORE = '"red K" of K layers, or "lora --lr 1e-3" with one rate'


@dataclass(frozen=True)
class Study:
    """about: the table's caption, with arguments' names in braces. columns: after the labels."""

    about: str
    labels: list[str]
    columns: dict[str, Callable[[Cells], str]]
    rows: Callable[[argparse.Namespace], Iterable[Row]]
    arguments: dict[str, dict]

    def table(self, rows: Iterable[Row], records: Records) -> Iterable[list[str]]:
        """The rows of which something is recorded."""
        for row in rows:
            cells = Cells(row, records)
            found = [say(cells) for say in self.columns.values()]
            if any(found):
                yield [*row.labels, *(text or NONE for text in found)]


# Runs


def lofit(args, model, task, by, k, seeds=(), more="", heads_of="") -> Pick:
    """Offsets on K heads that a way chose, for each seed; more: flags of both steps."""
    seeds = tuple(seeds or args.seeds)
    by = "all" if k == "all" else by
    select = "" if by in ("all", *DRAWN) else more
    if by in ("scales", "gates"):  # the ways that train take flags of a training
        select = f"{more} {args.select_flags}".strip()
    first = Run("train", model, task, args.data, seeds[0], args.dtype, "lofit", by, k, heads_of)
    first = replace(first, select=select, train=f"{more} {args.train_flags}".strip())
    return Pick(tuple(replace(first, lr_factor=factor) for factor in args.lr_factors), seeds)


def method(args, model, task, name, more="", chosen_on="") -> Pick:
    """ "lofit K", "random K", or a baseline with each strength or learning rate, for each seed; or
    "red K", of K layers, or "lora --lr 1e-3", with this rate alone. chosen_on: the task whose
    validation chooses a learning rate."""
    name, _, k = name.partition(" ")
    if name in OURS:
        return lofit(args, model, task, OURS[name], k, more=more)
    flag, values = BASELINES[name]
    if k.startswith(flag):
        values, k = [k.removeprefix(flag).strip()], ""
    more = f"{more} --top {k}" if k else more
    if flag == "--lr":
        more = f"{more} {args.train_flags}"
    chooser = chosen_on if chosen_on and flag == "--lr" else task
    first = Run("train", model, chooser, args.data, args.seeds[0], args.dtype, name)
    tried = [replace(first, train=f"{more.strip()} {flag} {value}".strip()) for value in values]
    return Pick(tuple(tried), tuple(args.seeds), task=task)


def known_method(text: str) -> str:
    """For argparse."""
    if text not in BASELINES and text.partition(" ")[0] not in (*OURS, *LAYERED):
        expected = f'"lofit K", "random K", {", ".join(BASELINES)}, {MORE}'
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
    return text


def asked(pick: Pick, task: str, kind: str = "asked") -> Pick:
    """The same runs, tested on another task or text."""
    return replace(pick, kind=kind, tested=task)


# Rows


def names(model: str, task: str) -> list[str]:
    return [Path(model).name, f"{task} ({main_metric(task)})"]


def sweep_rows(args) -> Iterable[Row]:
    for model, task, k in itertools.product(args.model, args.task, args.heads):
        drawn = None if k == "all" else lofit(args, model, task, "random", k)
        yield Row(names(model, task), lofit(args, model, task, args.by, k), drawn)


def heads_rows(args) -> Iterable[Row]:
    draws = range(args.seeds[0], args.seeds[0] + args.draws)
    for model, task, k in itertools.product(args.model, args.task, args.heads):
        picks = {}
        for way in args.by:
            picks[way] = lofit(args, model, task, way, k, draws if way in DRAWN else ())
        for way, pick in picks.items():
            yield Row([*names(model, task), k, way], pick, picks.get("random"))


def methods_rows(args) -> Iterable[Row]:
    every = [*(f"lofit {k}" for k in args.heads), *args.methods]
    for model, task in itertools.product(args.model, args.task):
        picks = [method(args, model, task, name, chosen_on=args.chosen_on) for name in every]
        for name, pick in zip(every, picks, strict=True):
            yield Row([*names(model, task), name], pick, picks[0])


def tasks_rows(args) -> Iterable[Row]:
    for model, task in itertools.product(args.model, args.task):
        ours, drawn = (lofit(args, model, task, by, args.heads) for by in (args.by, "random"))
        run = Run("train", model, task, args.data, args.seeds[0], args.dtype, "lora")
        run = replace(run, train=f"{args.train_flags} --lr {args.lora_lr}".strip())
        lora = Pick((run,), tuple(args.seeds))
        found = find_tasks(task)[0]
        # of the paper's tasks the one that the paper reports
        for metric in found.metrics[:1] if found.max_length else found.metrics:
            labels = [Path(model).name, f"{task} ({metric})"]
            yield Row(labels, ours, drawn, lora, metric)


def data_rows(args) -> Iterable[Row]:
    for model, task, n in itertools.product(args.model, args.task, args.examples):
        more = "" if n == "all" else f"--n-train {n}"
        picks = [method(args, model, task, name, more) for name in args.methods]
        for name, pick in zip(args.methods, picks, strict=True):
            yield Row([*names(model, task), n, name], pick, picks[0])


def transfer_rows(args) -> Iterable[Row]:
    for model, task, source in itertools.product(args.model, args.task, args.task):
        labels, own = names(model, task), lofit(args, model, task, args.by, args.heads)
        if task == source:
            yield Row([*labels, "heads", source], own, own)
        elif task in (args.tested or args.task):
            taken = lofit(args, model, task, args.by, args.heads, heads_of=source)
            yield Row([*labels, "heads", source], taken, own)
            theirs = lofit(args, model, source, args.by, args.heads)
            yield Row([*labels, "offsets", source], asked(theirs, task), own)


def forgets_rows(args) -> Iterable[Row]:
    tuned = [task for task in args.task if task in (args.tuned or args.task)]
    for model, task, name, other in itertools.product(args.model, tuned, args.methods, args.task):
        if other != task:
            pick, first = (method(args, model, task, each) for each in (name, args.methods[0]))
            text = asked(pick, args.text or other, "text")
            labels = [Path(model).name, task, name, names(model, other)[1]]
            yield Row(labels, asked(pick, other), asked(first, other), text)


def rules_rows(args) -> Iterable[Row]:
    for model, task, name in itertools.product(args.model, args.task, args.methods):
        yield Row([*names(model, task), name], method(args, model, task, name), None)


def quantized_rows(args) -> Iterable[Row]:
    for model, task, name in itertools.product(args.model, args.task, args.methods):
        whole = method(args, model, task, name)
        four = replace(whole, tried=tuple(replace(run, quantize="nf4") for run in whole.tried))
        for weights, pick in ((args.dtype, whole), ("nf4", four)):
            yield Row([*names(model, task), name, weights], pick, whole)


def layers_rows(args) -> Iterable[Row]:
    for model, task, other in itertools.product(args.model, args.task, args.task):
        both = [lofit(args, model, name, args.by, args.heads) for name in (task, other)]
        both = [Pick((pick.tried[0].selection,), pick.seeds, "select") for pick in both]
        yield Row([Path(model).name, args.heads, task, other], *both)


# Studies

SCORE = "mean (points above the base [interval]): each run of seeds {seeds}"
LR = "where several were tried the first seed's best on validation"
HEADS = {"default": "10%", "help": "how many heads (default: 10%%)"}
BY = {"default": "scales", "help": "the way of choosing heads"}
METHODS = {
    "nargs": "+",
    "type": known_method,
    "help": f'"lofit K", "random K", {", ".join(BASELINES)}, {MORE}',
}
STUDIES = {
    "sweep": Study(
        f"Heads by {{by}} beside as many random ones, test split: {SCORE}",
        ["model", "task"],
        {"base": lambda c: c.base(c.ours or c.other), "heads": lambda c: c.heads(c.ours or c.other),
         "values": lambda c: c.values(c.ours or c.other), "LoFiT": lambda c: c.score(c.ours),
         "random heads": lambda c: c.score(c.other),
         "LoFiT − random": lambda c: c.minus(c.ours, c.other)},
        sweep_rows,
        {"--heads": {"nargs": "+", "default": ["10%", "3%"]}, "--by": BY},
    ),
    "heads": Study(
        f"Test split: {SCORE}, of {{draws}} seeds where heads are drawn; ± runs: their standard"
        f" deviation, in points; lr: {LR}",
        ["model", "task", "heads", "chosen by"],
        {"score": lambda c: c.score(c.ours), "− random": lambda c: c.minus(c.ours, c.other),
         "± runs": Cells.spread, "lr": Cells.chosen},
        heads_rows,
        {"--heads": {"nargs": "+", "default": ["1%", "3%", "10%", "30%"]},
         "--by": {"nargs": "+", "default": ["scales", "gradient", "probe", "random"]},
         "--draws": {"type": natural, "default": 5}},
    ),
    "methods": Study(
        f"Test split: {SCORE}; chosen: the learning rate or strength of each run, {LR}",
        ["model", "task", "method"],
        {"values": lambda c: c.values(c.ours), "score": lambda c: c.score(c.ours),
         "LoFiT − it": lambda c: c.minus(c.other, c.ours), "chosen": Cells.chosen},
        methods_rows,
        {"--heads": {"nargs": "+", "default": ["10%", "3%", "all"], "help": "of LoFiT"},
         "--methods": {"nargs": "*", "default": list(BASELINES), "type": known_method},
         "--chosen-on": {"default": "", "help": "the task whose validation chooses the baselines'"
                         " learning rate (default: each its own)"}},
    ),
    "tasks": Study(
        "{heads} of the heads, by {by}, beside as many random ones, LoRA with lr {lora_lr}, always"
        " one answer, and the task's cheap rule."
        " Test split, mean of the seeds {seeds} in percent; differences in points [interval]",
        ["model", "task"],
        {"base": lambda c: c.base(c.ours, sign=""), "one answer": Cells.always,
         "rule": Cells.rule_score, "random heads": lambda c: c.mean(c.other),
         "LoRA": lambda c: c.mean(c.third), "LoFiT": lambda c: c.mean(c.ours),
         "LoFiT − base": lambda c: c.gain(c.ours), "LoFiT − rule": Cells.minus_rule,
         "LoFiT − random": lambda c: c.minus(c.ours, c.other),
         "LoFiT − LoRA": lambda c: c.minus(c.ours, c.third)},
        tasks_rows,
        {"--heads": HEADS, "--by": BY, "--lora-lr": {"default": "5e-4", "help": "of LoRA"}},
    ),
    "data": Study(
        f"Test split: {SCORE}. Heads are selected for each number of examples; chosen: the learning"
        f" rate of each run, {LR}",
        ["model", "task", "examples", "method"],
        {"score": lambda c: c.score(c.ours),
         "{methods[0]} − it": lambda c: c.minus(c.other, c.ours),
         "chosen": Cells.chosen},
        data_rows,
        {"--examples": {"nargs": "+", "default": ["10", "25", "50", "100", "all"]},
         "--methods": METHODS | {"default": ["lofit 10%", "lora", "red"]}},
    ),
    "transfer": Study(
        f"Test split, {{heads}} of heads: {SCORE}. Heads: chosen on one task, trained on another."
        " Offsets: trained on one task, tested on another",
        ["model", "tested on", "what", "from"],
        {"score": lambda c: c.score(c.ours), "own − taken": lambda c: c.minus(c.other, c.ours)},
        transfer_rows,
        {"--heads": HEADS, "--by": BY, "--tested": {"nargs": "+", "help": "tasks (default: all)"}},
    ),
    "forgets": Study(
        "Test split, seeds {seeds}: change of another task's score in points [interval], and the"
        " mean over texts (the other task's prompts, or --text) of their tokens' mean loss before →"
        " after",
        ["model", "tuned on", "by", "asked"],
        {"base": lambda c: c.base(c.ours), "change": lambda c: c.gain(c.ours),
         "{methods[0]} − it": lambda c: c.minus(c.other, c.ours), "loss of text": Cells.text_loss},
        forgets_rows,
        {"--methods": METHODS | {"default": ["lofit 3%", "lofit 10%", "lofit all", "lora", "red"]},
         "--tuned": {"nargs": "+", "help": "tasks (default: all)"},
         "--text": {"help": "a file of plain text instead of prompts, one text a line"}},
    ),
    "rules": Study(
        "Percent right beside the task's cheap rule, their difference in points [interval]; then of"
        " the items that the rule gets right, and of the others. Test split, mean of the seeds"
        " {seeds}",
        ["model", "task", "method"],
        {"score": lambda c: c.mean(c.ours), "rule": Cells.rule_score, "it − rule": Cells.minus_rule,
         "rule right": lambda c: c.where_rule(True), "rule wrong": lambda c: c.where_rule(False)},
        rules_rows,
        {"--methods": METHODS | {"default": ["lofit 10%", "random 10%", "lofit all", *BASELINES]}},
    ),
    "quantized": Study(
        f"The base model's weights as they are and in 4 bits (NF4), test split: {SCORE}",
        ["model", "task", "method", "weights"],
        {"base": lambda c: c.base(c.ours), "score": lambda c: c.score(c.ours),
         "− {dtype}": lambda c: c.minus(c.ours, c.other)},
        quantized_rows,
        {"--methods": METHODS | {"default": ["lofit 10%"]}},
    ),
    "layers": Study(
        "{heads} of heads by {by}, seeds {seeds}: the mean layer of a task's heads, the first and"
        " the last; the share that its selections have in common with those of the task beside it"
        " (beside itself: of its seeds and folds; by chance {heads}), and the rank correlation of"
        " all heads' scores",
        ["model", "heads", "task", "beside"],
        {"mean layer": Cells.mean_layer, "layers": Cells.span, "shared": Cells.shared,
         "correlation": Cells.correlation},
        layers_rows,
        {"--heads": HEADS, "--by": BY},
    ),
}  # fmt: skip
