"""Do heads and offsets of one task serve another?

    python -m lofit.studies.transfer --model weights/mini-llama --heads 10%

Heads: chosen on one task, offsets trained and tested on another. Offsets: trained on one task,
tested on another as they are. Tested is every task, or each of --tested.
"""

import argparse
import itertools
from pathlib import Path

from lofit import errors
from lofit.run.arguments import find_task
from lofit.studies.cells import Cell, Setting, finish, run_cells
from lofit.studies.plan import Plan, Trials, study_parser
from lofit.studies.tables import (
    cell,
    compare,
    lines_of,
    markdown,
    picture,
    points,
    summary,
    write_table,
)

ABOUT = (
    "{split} split; {k} of heads, seeds {seeds}: mean score, points above the base [95 % interval"
    " over the items]: each seed; the mean less that with the task's own heads or offsets"
)
HEADER = ["model", "tested on", "what", "from", "score", "less own"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.add_argument("--heads", default="10%")
    parser.add_argument("--by", default="scales", help="the way of choosing heads")
    parser.add_argument("--tested", nargs="+", help="the tasks to test on (default: all)")
    return parser.parse_args(argv)


def with_heads_of(plan: Plan, target: Setting, source: Setting) -> Trials:
    """Offsets trained on the target with the heads that were chosen for the source."""
    by, k = plan.args.by, plan.args.heads
    own = plan.selection(source, by)
    if source == target:
        return plan.lofit(target, by, k)
    other = find_task(source.task)[0]
    theirs = f"{other}-{by}"
    folder = plan.folder(target, f"seed{target.seed}", f"by-{theirs}")
    step = target.select(folder, "--by", f"task:{own.steps[0].folder}")
    taken = Cell(f"{target.name} seed {target.seed} by {theirs}", [step], (own,))
    return plan.lofit(target, theirs, k, taken)


def with_offsets_of(plan: Plan, target: Setting, source: Setting, trained: Trials) -> Path:
    """The folder in which the source's best offsets are tested on the target (of a source in folds
    the first one's, where the target has none)."""
    folder = trained.folder / f"on-{find_task(target.task)[0]}-{target.split}"
    folds = find_task(source.task)[1].FOLDS and not find_task(target.task)[1].FOLDS
    base, from_base = plan.base(target)

    def steps() -> list:
        best = trained.results() / "fold0" if folds else trained.results()
        return [target.evaluate(folder, "--offsets", str(best), *from_base)]

    name = f"{target.name} seed {target.seed} offsets of {find_task(source.task)[0]}"
    plan.cells.append(Cell(name, steps, (base, trained.evaluated)))
    return folder


def row_of(what: str, target: list[Setting], source: str, runs: list[Path], own: list[Path]):
    """{} if none is done."""
    metric = find_task(target[0].task)[1].MAIN_METRIC
    if (found := summary(runs, metric)) is None:
        return {}
    row = {"model": Path(target[0].model).name, "task": target[0].task, "metric": metric}
    row |= {"what": what, "from": source, "score": found}
    return row | {"less_own": None if runs == own else compare(runs, own, metric)}


def as_text(row: dict) -> list[str]:
    less = row["less_own"]
    return [
        row["model"], f"{row['task']} ({row['metric']})", row["what"], row["from"],
        cell(row["score"]), points(*less.values()) if less else "–",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan, heads, offsets = Plan(args), {}, {}
    of = {(each[0].model, each[0].task): each for each in plan.settings()}
    tested = args.tested or args.task
    pairs = [
        (model, task, source)
        for model, task, source in itertools.product(args.model, args.task, args.task)
        if task in tested or task == source  # whose offsets are tested elsewhere
    ]
    for model, task, source in sorted(pairs, key=lambda p: (p[1] not in tested, p[1] != p[2])):
        both = list(zip(of[model, task], of[model, source], strict=True))
        heads[model, task, source] = [with_heads_of(plan, t, s) for t, s in both]
    for model, task, source in pairs:
        if task != source:
            trained = heads[model, source, source]
            both = zip(of[model, task], of[model, source], trained, strict=True)
            offsets[model, task, source] = [with_offsets_of(plan, *three) for three in both]
    failed = run_cells(plan.cells, args.jobs, args.device)
    rows = []
    for model, task, source in pairs:
        own = [trials.results() for trials in heads[model, task, task]]
        runs = [trials.results() for trials in heads[model, task, source]]
        rows.append(row_of("heads", of[model, task], source, runs, own))
        if task != source:
            runs = offsets[model, task, source]
            rows.append(row_of("offsets", of[model, task], source, runs, own))
    rows = [row for row in rows if row]
    seeds = " ".join(map(str, args.seeds))
    about = ABOUT.format(split=args.split, k=args.heads, seeds=seeds)
    write_table(args.out, "transfer", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    lines = lines_of(rows, x="from", line="what")
    picture(args.out / "transfer.png", lines, "heads or offsets of", "score", joined=False)
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
