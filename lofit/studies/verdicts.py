"""LoFiT − the other, in points, on the paper's splits of the real models. Intervals (95 %) count
what is independent: edits of MQuAKE, chains of relations of CLUTRR, categories of TruthfulQA, and
runs. A side with one run borrows how runs vary from LoFiT's own runs with seven heads or more and
all examples, though another method may vary otherwise. p is corrected for the number of comparisons
(Holm). Claim 2 is pooled (random effects) over test sets, a model's task
each, from cells of several runs a side. Several numbers of heads share the items and the selections
of a test set: it counts once, with the mean of their differences and the mean of their errors, as
if they rose and fell together. Two models that answer the same questions count as independent."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lofit.run.summary import mean
from lofit.studies import tables
from lofit.studies.intervals import Difference, Spread, holm, pooled, run_spread
from lofit.studies.records import Records, Run
from lofit.tasks import main_metric

SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
TEN = {"method": "lofit", "by": "scales", "k": "10%"}
ALL = {"method": "lofit", "by": "all", "k": "all"}
DRAWN = TEN | {"by": "random"}
MANY = 7  # heads, from which on runs vary little
COMMON = {"kind": "train", "data": "data/real", "dtype": "float32", "quantize": ""}
COMMON |= {"lr_factor": 1.0}


@dataclass(frozen=True)
class Side:
    """Runs that differ by their seed alone: what identifies them beside the model and the task."""

    label: str
    fields: dict

    def runs(self, records: Records, model: str, task: str) -> list[Run]:
        plain = {"task": task, "heads_of": "", "train": "", "select": ""}
        return tested(records, model, plain | self.fields)


def tested(records: Records, model: str, fields: dict) -> list[Run]:
    """The runs of a model with these fields whose test scores are recorded."""
    wanted = (COMMON | fields).items()
    runs = (run for run in records.of_model(model) if records.done(run, "eval.py"))
    return [run for run in runs if all(getattr(run, key) == value for key, value in wanted)]


def baseline(name: str, *flags: str) -> Side:
    return Side(f"{name} {' '.join(flags)}", {"method": name, "train": " ".join(flags)})


LOFIT, EVERY = Side("10 %", TEN), Side("all heads", ALL)
RULE = "cheap rule"
# claim, model, task, LoFiT's side, the other: a side, RULE, or None for the base model
COMPARED = [
    *(("1", m, t, LOFIT, None) for m, t in (
        (SMOL, "mquake"), (SMOL, "clutrr"), (SMOL, "truthfulqa"), (GEMMA, "mquake"),
        (GEMMA, "clutrr"))),
    *(("1", m, t, side, RULE) for m, t, side in (
        (SMOL, "mquake", LOFIT), (SMOL, "clutrr", LOFIT), (SMOL, "clutrr", EVERY),
        (GEMMA, "mquake", LOFIT), (GEMMA, "clutrr", LOFIT))),
    ("1", SMOL, "truthfulqa", LOFIT, baseline("iti", "--alpha 5")),
    ("1", SMOL, "truthfulqa", LOFIT, baseline("repe", "--alpha 0.5")),
    ("3", SMOL, "mquake", LOFIT, Side("CLUTRR's heads", TEN | {"heads_of": "clutrr"})),
    ("3", SMOL, "clutrr", Side("10 % by gradients", TEN | {"by": "gradient"}),
     Side("MQuAKE's heads by gradients", TEN | {"by": "gradient", "heads_of": "mquake"})),
    *(("5", SMOL, "mquake", LOFIT, baseline("lora", f"--lr {lr}"))
      for lr in ("5e-4", "1e-3", "2e-3")),
    ("5", SMOL, "mquake", LOFIT, baseline("red", "--lr 5e-3")),
    ("5", SMOL, "mquake", EVERY, baseline("red", "--lr 5e-3")),
    ("5", SMOL, "mquake", EVERY, baseline("bias", "--lr 5e-3")),
    ("5", SMOL, "mquake", EVERY, baseline("red", "--top 15", "--lr 2e-2")),
    ("5", SMOL, "mquake", EVERY, baseline("lora_rank1", "--top 9", "--lr 5e-2")),
    ("5", SMOL, "truthfulqa", LOFIT, baseline("lora", "--lr 5e-4")),
    ("5", SMOL, "truthfulqa", LOFIT, baseline("red", "--lr 5e-3")),
    *(("6", SMOL, "mquake", ours, baseline(name, f"--n-train {n}", f"--lr {lr}"))
      for n, name, lr in ((25, "red", "2e-2"), (25, "lora", "2e-3"), (50, "red", "5e-3"),
                          (50, "lora", "2e-3"))
      for more in ({"train": f"--n-train {n}"},)
      for ours in (Side(f"10 %, {n} examples", TEN | more | {"select": more["train"]}),
                   Side(f"all heads, {n} examples", ALL | more))),
    *(("7", SMOL, "mquake", Side(f"{k} %", TEN | {"k": f"{k}%"}), LOFIT) for k in (20, 30, 50)),
    *(("7", m, t, EVERY, LOFIT) for m, t in (
        (SMOL, "mquake"), (SMOL, "clutrr"), (SMOL, "truthfulqa"), (GEMMA, "mquake"))),
]  # fmt: skip


def spread_of_runs(records: Records, by: tuple[str, ...]) -> Spread:
    """Of LoFiT's cells with MANY heads or more, on all examples, whose heads were chosen in one of
    these ways. (With few examples runs vary far more.)"""
    cells: dict[Run, list[Run]] = {}
    for model in (SMOL, GEMMA):
        for run in tested(records, model, {"method": "lofit", "train": "", "select": ""}):
            if run.by in by and tables.n_heads(records.of(run)) >= MANY:
                cells.setdefault(replace(run, seed=0), []).append(run)
    return run_spread(
        (tables.scores_of(records, runs), records.of(runs[0].base).get("clusters"))
        for runs in cells.values()
        if len(runs) > 1
    )


class Comparisons:
    def __init__(self, records: Records):
        self.records = records
        self.drawn = spread_of_runs(records, ("random",))
        self.fixed = spread_of_runs(records, ("scales", "gradient", "all"))

    def difference(self, ours: list[Run], theirs: list[Run] | None) -> Difference:
        """theirs: empty for the base model, None for the cheap rule. A side with one run borrows
        how runs vary."""
        lent = [
            (self.drawn if side[0].by == "random" else self.fixed) if len(side) == 1 else None
            for side in (ours, theirs or [])
        ]
        return tables.compared(self.records, ours, theirs, borrowed=lent)

    def rows(self) -> Iterator[list[str]]:
        found = []
        for claim, model, task, one, other in COMPARED:
            ours = one.runs(self.records, model, task)
            if isinstance(other, Side):
                versus, theirs = other.label, other.runs(self.records, model, task)
                ours = ours if theirs else []  # nothing to compare with yet
            else:
                versus, theirs = (RULE, None) if other else ("base model", [])
            if ours:
                labels = [claim, model, f"{task} ({main_metric(task)})", one.label, versus]
                found.append((labels, ours, theirs, self.difference(ours, theirs)))
        corrected = holm([diff.p for *_, diff in found])
        for (labels, ours, theirs, diff), p in zip(found, corrected, strict=True):
            sizes = [len(side) for side in (ours, theirs) if side]
            runs = ", ".join(map(str, sizes))
            means = [mean(tables.rule_scores(self.records, ours[0])) if side is None
                     else mean(tables.means_of(self.records, side or [ours[0].base]))
                     for side in (ours, theirs)]  # fmt: skip
            percent = "{:.1f} and {:.1f}".format(*(100 * share for share in means))
            yield [*labels, runs, percent, tables.said(diff), f"{p:.3f}"]
        yield from self.pooled_rows()

    def pooled_rows(self) -> Iterator[list[str]]:
        """Claim 2: chosen − random heads."""
        cells: dict[bool, dict[tuple, list[Difference]]] = {True: {}, False: {}}
        for model in (SMOL, GEMMA):
            of = {(run.task, run.k) for run in self.records.of_model(model) if run.by == "scales"}
            for task, k in sorted(of):
                sides = [Side("", way | {"k": k}) for way in (TEN, DRAWN)]
                ours, theirs = (side.runs(self.records, model, task) for side in sides)
                if len(ours) > 1 and len(theirs) > 1:
                    many = tables.n_heads(self.records.of(ours[0])) >= MANY
                    found = self.difference(ours, theirs)
                    cells[many].setdefault((model, task), []).append(found)
        for many, sets in cells.items():
            if len(sets) > 1:
                each = [(mean([d.mean for d in of]), mean([d.error for d in of]))
                        for of in sets.values()]  # fmt: skip
                middle, low, high = map(tables.points, pooled(each))
                heads = f"{MANY} or more" if many else f"fewer than {MANY}"
                labels = ["2", "both", f"{len(sets)} test sets pooled", f"{heads} chosen heads"]
                yield [*labels, "as many random", "", "", f"{middle} [{low}, {high}]", ""]


HEADER = ["claim", "model", "task", "LoFiT", "the other", "runs", "percent", "LoFiT − other", "p"]


def table(records: Records) -> str:
    return tables.markdown(HEADER, Comparisons(records).rows())
