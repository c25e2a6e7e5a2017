"""The whole job for every model, task, number of heads and seed, beside as many random heads.

    python -m lofit.studies.sweep              # both miniatures, all three tasks: runs/sweep/
    python -m lofit.studies.sweep --model weights/mini-llama --task mquake --heads 3% 10% all

Prints a Markdown table and writes it, and its numbers as JSON, to --out. Selection runs once per
model, task and seed, and its scores serve every number of heads.
"""

import argparse
import itertools
import shlex
from pathlib import Path

from lofit import errors
from lofit.files import read_json
from lofit.session import find_task
from lofit.studies.cells import Cell, Setting, add_study_args, finish, run_cells
from lofit.studies.tables import cell, compare, markdown, points, summary, write_table

ABOUT = (
    "{split} split; after the mean score its points above the base with the 95 % interval over the"
    " items, then each of the seeds {seeds}"
)
HEADER = ["model", "task", "base", "heads", "values", "LoFiT", "random heads", "LoFiT − random"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_study_args(parser, "runs/sweep")
    parser.add_argument("--heads", nargs="+", default=["10%", "3%"], help="numbers, shares, or all")
    for script in ("select", "train"):
        parser.add_argument(
            f"--{script}-flags", type=shlex.split, default=[], help='more flags, like "--lr 0.1"'
        )
    return parser.parse_args(argv)


def run_of(args: argparse.Namespace, setting: Setting, choice: str, k: str) -> Path:
    """The folder of a run."""
    name = "all" if k == "all" else f"{choice}-{k}"
    return args.out / setting.name / f"seed{setting.seed}-{name}"


def cells_of(args: argparse.Namespace, setting: Setting, asked: Cell) -> list[Cell]:
    """The selection of one model, task and seed, and the runs of each choice of K heads. asked: the
    cell in which the base model was."""
    base = ("--base-from", str(args.out / setting.name / "base"))
    selected = args.out / setting.name / f"seed{setting.seed}"
    title = f"{setting.name} seed {setting.seed}"
    ranked = Cell(f"{title} selection", [setting.select(selected, *args.select_flags)])
    cells = []
    for k, choice in itertools.product(args.heads, ("lofit", "random")):
        run = run_of(args, setting, choice, k)
        if k == "all":  # no choice to be made
            flags, needs = ("--heads", "all"), (asked,)
        elif choice == "lofit":
            flags, needs = ("--heads", str(selected), "--top", k), (asked, ranked)
        else:
            flags, needs = ("--heads", "random", "--top", k), (asked,)
        if k != "all" or choice == "lofit":
            steps = [setting.train(run, *flags, *args.train_flags), setting.evaluate(run, *base)]
            cells.append(Cell(f"{title} {run.name.partition('-')[2]}", steps, needs))
    return cells


def table_row(args: argparse.Namespace, settings: list[Setting], k: str) -> dict | None:
    """The runs of K heads of one model and task, of all seeds; None if none is done. Of a task in
    folds, each of which has its own heads, the number in one fold."""
    lofit, drawn = (
        [run_of(args, s, choice, k) for s in settings] for choice in ("lofit", "random")
    )
    done = [run for run in (*lofit, *drawn) if (run / "results.json").exists()]
    if not done:
        return None
    first, metric = read_json(done[0] / "results.json"), find_task(settings[0].task)[1].MAIN_METRIC
    row = {"model": Path(settings[0].model).name, "task": settings[0].task, "metric": metric}
    row |= {"k": k, "heads": len(first["heads"][0] if "folds" in first else first["heads"])}
    row |= {"values": first["trained_values"], "base": first["base"][metric]}
    row |= {"seeds": args.seeds, "lofit": summary(lofit, metric)}
    if k == "all":
        return row | {"random": None, "lofit - random": None}
    return row | {
        "random": summary(drawn, metric),
        "lofit - random": compare(lofit, drawn, metric),
    }


def as_text(row: dict) -> list[str]:
    """A line of the table."""
    difference = row["lofit - random"]
    return [
        row["model"], f"{row['task']} ({row['metric']})", f"{row['base']:.1%}", str(row["heads"]),
        f"{row['values']:,}", cell(row["lofit"]), cell(row["random"]),
        points(*difference.values()) if difference else "–",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = {
        (model, task): [
            Setting(model, task, args.data, seed, args.dtype, args.split) for seed in args.seeds
        ]
        for model, task in itertools.product(args.model, args.task)
    }
    cells = []
    for each in settings.values():
        folder = args.out / each[0].name / "base"
        asked = Cell(f"{each[0].name} base", [each[0].ask_base(folder)])
        cells += [cell for setting in each for cell in cells_of(args, setting, asked)]
    failed = run_cells(cells, args.jobs, args.device)
    rows = [table_row(args, each, k) for each in settings.values() for k in args.heads]
    rows = [row for row in rows if row]
    about = ABOUT.format(split=args.split, seeds=", ".join(map(str, args.seeds)))
    write_table(args.out, "sweep", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
