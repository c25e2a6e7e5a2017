"""LoFiT − the other, in points, on the paper's splits of the real models. Intervals (95 %) count
what is independent: edits of MQuAKE, stories, questions, and runs. A side with one run (°) borrows
how runs vary from LoFiT's own runs with seven heads or more. p is corrected for the number of
comparisons (Holm). Claim 2 is pooled (random effects) over test sets, a model's task each, from
cells of several runs a side. Several numbers of heads share the items and the selections of a test
set: it counts once, with the mean of their differences and the mean of their errors, as if they
rose and fell together. Two models that answer the same questions count as independent."""

from collections.abc import Iterator
from dataclasses import dataclass

from lofit.run.summary import mean
from lofit.studies.intervals import Difference, Spread, difference, holm, pooled, run_spread
from lofit.studies.records import Records, Run
from lofit.studies.tables import ONE_RUN, groups_of, markdown, mean_items, points, scores_of
from lofit.tasks import main_metric

SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
TEN = {"method": "lofit", "by": "scales", "k": "10%"}
ALL = {"method": "lofit", "by": "all", "k": "all"}
DRAWN = TEN | {"by": "random"}
MANY = 7  # heads, from which on runs vary little
LIKE = ("train", "data/real", "lofit", 1.0, "")


@dataclass(frozen=True)
class Side:
    """Runs that differ by their seed alone: what identifies them beside the model and the task."""

    label: str
    fields: dict

    def runs(self, records: Records, model: str, task: str) -> list[Run]:
        wanted = {"kind": "train", "task": task, "data": "data/real", "lr_factor": 1.0}
        wanted |= {"heads_of": "", "train": "", "select": "", "quantize": ""} | self.fields
        return [
            run
            for run in records.of_model(model)
            if records.done(run, "eval.py")
            and all(getattr(run, key) == value for key, value in wanted.items())
        ]


def baseline(name: str, *flags: str) -> Side:
    return Side(f"{name} {' '.join(flags)}", {"method": name, "train": " ".join(flags)})


LOFIT, EVERY, RANDOM = Side("10 %", TEN), Side("all heads", ALL), Side("random heads", DRAWN)
# claim, model, task, LoFiT's side, the other; the other None: the base model
COMPARED = [
    *(("1", m, t, LOFIT, None) for m, t in (
        (SMOL, "mquake"), (SMOL, "clutrr"), (SMOL, "truthfulqa"), (GEMMA, "mquake"),
        (GEMMA, "clutrr"))),
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
    ("5", SMOL, "truthfulqa", LOFIT, baseline("lora", "--lr 5e-4")),
    ("5", SMOL, "truthfulqa", LOFIT, baseline("red", "--lr 5e-3")),
    *(("6", SMOL, "mquake", ours, baseline(name, f"--n-train {n}", f"--lr {lr}"))
      for n, name, lr in ((25, "red", "2e-2"), (25, "lora", "2e-3"), (50, "red", "5e-3"),
                          (50, "lora", "2e-3"))
      for more in ({"train": f"--n-train {n}"},)
      for ours in (Side(f"10 %, {n} examples", TEN | more | {"select": more["train"]}),
                   Side(f"all heads, {n} examples", ALL | more))),
    *(("7", m, t, EVERY, LOFIT) for m, t in (
        (SMOL, "mquake"), (SMOL, "clutrr"), (SMOL, "truthfulqa"), (GEMMA, "mquake"))),
]  # fmt: skip


def spread_of_runs(records: Records, by: tuple[str, ...]) -> Spread:
    """Of LoFiT's cells with MANY heads or more whose heads were chosen in one of these ways."""
    cells: dict[tuple, list[Run]] = {}
    for model in (SMOL, GEMMA):
        for run in records.of_model(model):
            alike = (run.kind, run.data, run.method, run.lr_factor, run.quantize) == LIKE
            if alike and run.by in by:
                if records.done(run, "eval.py") and n_heads(records, run) >= MANY:
                    key = tuple({**run.as_dict(), "seed": 0}.items())
                    cells.setdefault(key, []).append(run)
    parts = [
        run_spread([scores_of(records, runs)], groups_of(records, runs))
        for runs in cells.values()
        if len(runs) > 1
    ]
    df = sum(part.df for part in parts)
    return Spread(sum(part.variance * part.df for part in parts) / df, df)


def n_heads(records: Records, run: Run) -> int:
    heads = records.of(run)["heads"]
    return len(heads if isinstance(heads[0][0], int) else heads[0])


def compared(
    records: Records, one: list[Run], other: list[Run], fixed: Spread, drawn: Spread
) -> Difference:
    """other: empty for the base model, which does not vary."""
    base = [one[0].base]
    sides = [scores_of(records, runs) for runs in (one, other or base)]
    borrowed = [
        (drawn if runs[0].by == "random" else fixed) if len(runs) == 1 else None
        for runs in (one, other or base)
    ]
    borrowed[1] = borrowed[1] if other else None
    return difference(*sides, groups_of(records, one), borrowed)


def rows(records: Records) -> Iterator[list[str]]:
    fixed, drawn = (
        spread_of_runs(records, by) for by in (("scales", "gradient", "all"), ("random",))
    )
    found = []
    for claim, model, task, one, other in COMPARED:
        ours = one.runs(records, model, task)
        theirs = other.runs(records, model, task) if other else []
        if ours and (theirs or not other):
            found.append((claim, model, task, one, other, ours, theirs,
                          compared(records, ours, theirs, fixed, drawn)))  # fmt: skip
    corrected = holm([each[-1].p for each in found])
    for (claim, model, task, one, other, ours, theirs, diff), p in zip(
        found, corrected, strict=True
    ):
        means = [
            f"{100 * sum(mean_items(s)) / len(s[0]):.1f}"
            for s in (scores_of(records, runs) for runs in (ours, theirs or [ours[0].base]))
        ]
        runs = [
            f"{len(side)}{ONE_RUN if len(side) == 1 else ''}" for side in (ours, theirs) if side
        ]
        label = f"{task} ({main_metric(task)})"
        versus = other.label if other else "base model"
        low, high = diff.interval()
        yield [
            claim, model, label, one.label, versus, ", ".join(runs), " and ".join(means),
            f"{points(diff.mean)} [{points(low)}, {points(high)}]", f"{p:.3f}",
        ]  # fmt: skip
    yield from pooled_rows(records, fixed, drawn)


def pooled_rows(records: Records, fixed: Spread, drawn: Spread) -> Iterator[list[str]]:
    """Claim 2: chosen − random heads."""
    cells: dict[bool, dict[tuple, list[Difference]]] = {True: {}, False: {}}
    for model in (SMOL, GEMMA):
        for task, k in sorted({(r.task, r.k) for r in records.of_model(model) if r.by == "scales"}):
            ours = Side("", TEN | {"k": k}).runs(records, model, task)
            theirs = Side("", DRAWN | {"k": k}).runs(records, model, task)
            if len(ours) > 1 and len(theirs) > 1:
                of_many = cells[n_heads(records, ours[0]) >= MANY]
                found = compared(records, ours, theirs, fixed, drawn)
                of_many.setdefault((model, task), []).append(found)
    for many, sets in cells.items():
        if len(sets) > 1:
            middle, low, high = pooled(
                [(mean([d.mean for d in of]), mean([d.error for d in of])) for of in sets.values()]
            )
            number = f"{MANY} or more" if many else f"fewer than {MANY}"
            found = f"{points(middle)} [{points(low)}, {points(high)}]"
            pool = f"{len(sets)} test sets pooled"
            yield ["2", "both", pool, f"{number} chosen heads", "as many random", "", "", found, ""]


HEADER = ["claim", "model", "task", "LoFiT", "the other", "runs", "percent", "LoFiT − other", "p"]


def table(records: Records) -> str:
    return markdown(HEADER, rows(records))
