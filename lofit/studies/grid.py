"""What each study compares: the rows of its table, and the runs that a row needs."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lofit.run.arguments import natural
from lofit.studies import tables
from lofit.studies.cells import Pick
from lofit.studies.records import Records, Run
from lofit.studies.tables import Column, Row
from lofit.tasks import find_tasks, main_metric

DRAWN = ("random", "spread")  # ways of choosing that draw heads; the second is only recorded
# of train.py --method: the flag, as the records have it (--alpha is --strength), and what is tried
BASELINES = {
    "lora": ("--lr", ["1e-4", "5e-4", "2e-3"]),
    "red": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "bias": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "post_block": ("--lr", ["5e-3", "2e-2", "8e-2"]),
    "iti": ("--alpha", ["5", "15", "30"]),
    "repe": ("--alpha", ["0.5", "2", "8"]),
}


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
        return [
            [*row.labels, *found]
            for row, found in cells
            if "".join(found).strip(f"{tables.NONE} |")
        ]


# Runs


def lofit(args, model, task, by, k, seeds=None, more="", heads_of="") -> list[Pick]:
    """Offsets on K heads that a way chose, for each seed; more: flags of both steps."""
    seeds = seeds or args.seeds
    by = "all" if k == "all" else by
    select = "" if by in ("all", "random", "spread") else more
    if by in ("scales", "gates"):  # the ways that train take flags of a training
        select = f"{more} {args.select_flags}".strip()
    first = Run("train", model, task, args.data, seeds[0], args.dtype, "lofit", by, k, heads_of)
    first = replace(first, select=select, train=f"{more} {args.train_flags}".strip())
    tried = tuple(replace(first, lr_factor=factor) for factor in args.lr_factors)
    return [Pick(tried, seed) for seed in seeds]


def method(args, model, task, name, more="", chosen_on="") -> list[Pick]:
    """ "lofit K", or a baseline ("post_block K" of K layers) with each strength or learning rate,
    for each seed. chosen_on: the task whose validation chooses a learning rate."""
    name, _, k = name.partition(" ")
    if name == "lofit":
        return lofit(args, model, task, "scales", k, more=more)
    flag, values = BASELINES[name]
    chooser = chosen_on if chosen_on and flag == "--lr" else task
    first = Run("train", model, chooser, args.data, args.seeds[0], args.dtype, name)
    more = f"{more} --top {k}".strip() if k else more
    flags = f"{more} {args.train_flags}".strip() if flag == "--lr" else more
    tried = tuple(replace(first, train=f"{flags} {flag} {value}".strip()) for value in values)
    return [Pick(tried, seed, task=task) for seed in args.seeds]


def known_method(text: str) -> str:
    """For argparse."""
    if text not in BASELINES and text.partition(" ")[0] not in ("lofit", "post_block"):
        raise argparse.ArgumentTypeError(f'{text}: expected "lofit K", {", ".join(BASELINES)}')
    return text


def tested_on(task: str, picks: list[Pick], kind: str = "asked") -> list[Pick]:
    return [replace(pick, kind=kind, tested=task) for pick in picks]


# Rows


def names(model: str, task: str) -> list[str]:
    return [Path(model).name, f"{task} ({main_metric(task)})"]


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
        picks = {name: method(args, model, task, name, chosen_on=args.chosen_on) for name in every}
        for name in every:
            yield Row([*names(model, task), name], picks[name], picks[every[0]])


def tasks_rows(args) -> Iterable[Row]:
    for model, task in itertools.product(args.model, args.task):
        ours, drawn = (lofit(args, model, task, by, args.heads) for by in (args.by, "random"))
        run = Run("train", model, task, args.data, args.seeds[0], args.dtype, "lora")
        run = replace(run, train=f"{args.train_flags} --lr {args.lora_lr}".strip())
        lora = [Pick((run,), seed) for seed in args.seeds]
        found = find_tasks(task)[0]
        # of the paper's tasks the one that the paper reports
        for metric in found.metrics[:1] if found.max_length else found.metrics:
            labels = [Path(model).name, f"{task} ({metric})"]
            yield Row(labels, ours, drawn, tuple(lora), metric)


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


def quantized_rows(args) -> Iterable[Row]:
    for model, task, name in itertools.product(args.model, args.task, args.methods):
        whole = method(args, model, task, name)
        four = [
            replace(pick, tried=tuple(replace(run, quantize="nf4") for run in pick.tried))
            for pick in whole
        ]
        for weights, picks in ((args.dtype, whole), ("nf4", four)):
            yield Row([*names(model, task), name, weights], picks, whole)


def layers_rows(args) -> Iterable[Row]:
    for model, task, other in itertools.product(args.model, args.task, args.task):
        both = [lofit(args, model, name, args.by, args.heads) for name in (task, other)]
        both = [[Pick((p.tried[0].selection,), p.seed, "select") for p in part] for part in both]
        yield Row([Path(model).name, args.heads, task, other], *both)


# Studies

SCORE = "mean (points above the base [interval]): each run of seeds {seeds}"
LR = "lr: the first seed's best on validation"
HEADS = {"default": "10%", "help": "how many heads (default: 10%%)"}
BY = {"default": "scales", "help": "the way of choosing heads"}
METHODS = {"nargs": "+", "type": known_method, "help": f'"lofit K", {", ".join(BASELINES)}'}
STUDIES = {
    "sweep": Study(
        f"Heads by {{by}} beside as many random ones, test split: {SCORE}",
        ["model", "task"],
        {"base": tables.of_one(tables.base, True), "heads": tables.of_one(tables.n_heads, True),
         "values": tables.of_one(tables.values, True), "LoFiT": tables.score,
         "random heads": tables.score_of_less,
         "LoFiT − random": tables.minus("picks", "less")},
        sweep_rows,
        {"--heads": {"nargs": "+", "default": ["10%", "3%"]}, "--by": BY},
    ),
    "heads": Study(
        f"Test split: {SCORE}, of {{draws}} seeds where heads are drawn; ± runs: their standard"
        f" deviation, in points; {LR}",
        ["model", "task", "heads", "chosen by"],
        {"score": tables.score, "− random": tables.minus("picks", "less"),
         "± runs": tables.spread, "lr": tables.chosen},
        heads_rows,
        {"--heads": {"nargs": "+", "default": ["1%", "3%", "10%", "30%"]},
         "--by": {"nargs": "+", "default": ["scales", "gradient", "probe", "random"]},
         "--draws": {"type": natural, "default": 5}},
    ),
    "methods": Study(
        f"Test split: {SCORE}; chosen: learning rate or strength, the first seed's best on"
        " validation; seconds: the quickest selection and training",
        ["model", "task", "method"],
        {"values": tables.of_one(tables.values), "seconds": tables.seconds, "score": tables.score,
         "LoFiT − it": tables.minus("less", "picks"),
         "chosen": tables.chosen},
        methods_rows,
        {"--heads": {"nargs": "+", "default": ["10%", "3%", "all"], "help": "of LoFiT"},
         "--methods": {"nargs": "*", "default": list(BASELINES), "type": known_method},
         "--chosen-on": {"default": "", "help": "the task whose validation chooses the baselines'"
                         " learning rate (default: each its own)"}},
    ),
    "tasks": Study(
        "{heads} of the heads, by {by}, beside as many random ones, and LoRA with lr {lora_lr}."
        " Test split, mean of the seeds {seeds} in percent; differences in points [interval]",
        ["model", "task"],
        {"base": tables.base_mean, "one answer": tables.always,
         "random heads": tables.mean_of("less"), "LoRA": tables.mean_of("others"),
         "LoFiT": tables.mean_of("picks"), "LoFiT − base": tables.gain,
         "LoFiT − random": tables.minus("picks", "less"),
         "LoFiT − LoRA": tables.minus("picks", "others")},
        tasks_rows,
        {"--heads": HEADS, "--by": BY, "--lora-lr": {"default": "5e-4", "help": "of LoRA"}},
    ),
    "data": Study(
        f"Test split: {SCORE}. Heads are selected for each number of examples; learning rates on"
        " the whole validation split, with the first seed",
        ["model", "task", "examples", "method"],
        {"score": tables.score, "{methods[0]} − it": tables.minus("less", "picks"),
         "chosen": tables.chosen},
        data_rows,
        {"--examples": {"nargs": "+", "default": ["10", "25", "50", "100", "all"]},
         "--methods": METHODS | {"default": ["lofit 10%", "lora", "red"]}},
    ),
    "transfer": Study(
        f"Test split, {{heads}} of heads: {SCORE}. Heads: chosen on one task, trained on another."
        " Offsets: trained on one task, tested on another",
        ["model", "tested on", "what", "from"],
        {"score": tables.score, "own − taken": tables.minus("less", "picks")},
        transfer_rows,
        {"--heads": HEADS, "--by": BY, "--tested": {"nargs": "+", "help": "tasks (default: all)"}},
    ),
    "forgets": Study(
        "Test split, seeds {seeds}: change of another task's score in points [interval], and the"
        " loss of a token of text (the other task's prompts, or --text) before → after",
        ["model", "tuned on", "by", "asked"],
        {"base": tables.of_one(tables.base),
         "change": tables.gain,
         "{methods[0]} − it": tables.minus("less", "picks"), "loss of text": tables.text_loss},
        forgets_rows,
        {"--methods": METHODS | {"default": ["lofit 3%", "lofit 10%", "lofit all", "lora", "red"]},
         "--tuned": {"nargs": "+", "help": "tasks (default: all)"},
         "--text": {"help": "a file of plain text instead of prompts, one text a line"}},
    ),
    "quantized": Study(
        f"The base model's weights as they are and in 4 bits (NF4), test split: {SCORE}",
        ["model", "task", "method", "weights"],
        {"base": tables.of_one(tables.base), "score": tables.score,
         "− {dtype}": tables.minus("picks", "less")},
        quantized_rows,
        {"--methods": METHODS | {"default": ["lofit 10%"]}},
    ),
    "layers": Study(
        "{heads} of heads by {by}, seeds {seeds}: their layers; the share that two selections have"
        " in common (by chance {heads}), and the rank correlation of all heads' scores",
        ["model", "heads", "task", "beside"],
        {"mean layer | layers": tables.layers, "shared | correlation": tables.shared},
        layers_rows,
        {"--heads": HEADS, "--by": BY},
    ),
}  # fmt: skip
