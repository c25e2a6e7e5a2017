"""The whole job for every model, task, number of heads and seed, beside as many random heads.

    python -m lofit.studies.sweep              # both miniatures, all three tasks
    python -m lofit.studies.sweep --model weights/mini-llama --task mquake --heads 3% 10% all

Selection runs once per model, task and seed, and its scores serve every number of heads. With the
recipe's learning rate alone, unless --lr-factors names more.
"""

import argparse
import itertools
from pathlib import Path

from lofit import errors
from lofit.llm.files import read_json
from lofit.run.arguments import find_task
from lofit.studies.cells import Setting, finish, run_cells
from lofit.studies.plan import Plan, Trials, study_parser
from lofit.studies.tables import cell, compare, markdown, points, summary, write_table

ABOUT = (
    "{split} split, heads by {by}; after the mean score its points above the base with the 95 %"
    " interval over the items, then each of the seeds {seeds}"
)
HEADER = ["model", "task", "base", "heads", "values", "LoFiT", "random heads", "LoFiT − random"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.set_defaults(lr_factors=[1.0])
    parser.add_argument("--heads", nargs="+", default=["10%", "3%"], help="numbers, shares, or all")
    parser.add_argument("--by", default="scales", help="the way of choosing heads")
    return parser.parse_args(argv)


def table_row(settings: list[Setting], k: str, lofit: list[Trials], drawn: list[Trials]) -> dict:
    """The runs of K heads of one model and task, of all seeds; {} if none is done. Of a task in
    folds, each of which has its own heads, the number in one fold."""
    chosen, random = ([trials.results() for trials in each] for each in (lofit, drawn))
    done = [run for run in (*chosen, *random) if (run / "results.json").exists()]
    if not done:
        return {}
    first, metric = read_json(done[0] / "results.json"), find_task(settings[0].task)[1].MAIN_METRIC
    row = {"model": Path(settings[0].model).name, "task": settings[0].task, "metric": metric}
    row |= {"k": k, "heads": len(first["heads"][0] if "folds" in first else first["heads"])}
    row |= {"values": first["trained_values"], "base": first["base"][metric]}
    row |= {"seeds": [setting.seed for setting in settings], "lofit": summary(chosen, metric)}
    row |= {"random": summary(random, metric)}
    return row | {"lofit - random": compare(chosen, random, metric)}


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
    plan, runs = Plan(args), []
    for settings, k in itertools.product(plan.settings(), args.heads):
        lofit = [plan.lofit(setting, args.by, k) for setting in settings]
        drawn = [plan.lofit(setting, "random", k) for setting in settings if k != "all"]
        runs.append((settings, k, lofit, drawn))
    failed = run_cells(plan.cells, args.jobs, args.device)
    rows = [row for each in runs if (row := table_row(*each))]
    about = ABOUT.format(split=args.split, by=args.by, seeds=", ".join(map(str, args.seeds)))
    write_table(args.out, "sweep", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
