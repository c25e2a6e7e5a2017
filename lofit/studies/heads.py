"""Does it matter which heads? Every way of choosing, at several numbers of heads.

    python -m lofit.studies.heads --model weights/mini-llama --task mquake

The offsets' learning rate is chosen on validation for each way and number of heads, since they
interact: with the first seed, for all. Ways that draw (random, spread) have --draws seeds from the
first one on.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from lofit import errors
from lofit.run.arguments import find_task
from lofit.studies.cells import Setting, finish, run_cells
from lofit.studies.plan import Plan, Trials, study_parser
from lofit.studies.tables import (
    cell,
    chosen_flags,
    compare,
    lines_of,
    markdown,
    picture,
    points,
    spread_of,
    summary,
    write_table,
)  # fmt: skip

DRAWN = ("random", "spread")
WAYS = ["scales", "gradient", "offsets", "gates", "probe", *DRAWN]
ABOUT = (
    "{split} split; mean score, points above the base [95 % interval over the items]: each run, of"
    " seeds {seeds}, and of {draws} from the first on where heads are drawn. Beside it the mean"
    " less that of random draws, and the standard deviation of the runs, in points. The learning"
    " rate is the first run's best of {factors} times the recipe's on validation"
)
HEADER = ["model", "task", "heads", "chosen by", "score", "less random", "± runs", "lr"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.add_argument("--heads", nargs="+", default=["1%", "3%", "10%", "30%"])
    parser.add_argument("--by", nargs="+", default=WAYS)
    parser.add_argument("--draws", type=int, default=5)
    return parser.parse_args(argv)


def runs_of(plan: Plan, settings: list[Setting], way: str, k: str) -> list[Trials]:
    """A way's runs at K heads: of each seed, or, of ways that draw, of as many seeds as draws."""
    if way in DRAWN:
        first = settings[0]
        settings = [replace(first, seed=first.seed + i) for i in range(plan.args.draws)]
    return [plan.lofit(setting, way, k) for setting in settings]


def rows_of(settings: list[Setting], k: str, runs: dict[str, list[Trials]]) -> list[dict]:
    """A row for each way that has a run: its summary, and what it is above random draws."""
    metric = find_task(settings[0].task)[1].MAIN_METRIC
    folders = {way: [trials.results() for trials in each] for way, each in runs.items()}
    rows = []
    for way, each in folders.items():
        if (found := summary(each, metric)) is None:
            continue
        row = {"model": Path(settings[0].model).name, "task": settings[0].task, "metric": metric}
        row |= {"k": k, "by": way, "score": found, "lrs": chosen_flags(each), "less_random": None}
        row["sd"] = spread_of(found["scores"])
        if way != "random" and "random" in folders:
            row["less_random"] = compare(each, folders["random"], metric)
        rows.append(row)
    return rows


def as_text(row: dict) -> list[str]:
    less = row["less_random"]
    return [
        row["model"], f"{row['task']} ({row['metric']})", row["k"], row["by"], cell(row["score"]),
        points(*less.values()) if less else "–",
        "–" if row["sd"] is None else f"{100 * row['sd']:.1f}", " ".join(row["lrs"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan = Plan(args)
    runs = {
        (i, k): {way: runs_of(plan, settings, way, k) for way in args.by}
        for (i, settings), k in itertools.product(enumerate(plan.settings()), args.heads)
    }
    failed = run_cells(plan.cells, args.jobs, args.device)
    rows = [row for (i, k), each in runs.items() for row in rows_of(plan.settings()[i], k, each)]
    seeds = " ".join(map(str, args.seeds))
    about = ABOUT.format(split=args.split, seeds=seeds, draws=args.draws, factors=args.lr_factors)
    write_table(args.out, "heads", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    picture(args.out / "heads.png", lines_of(rows, x="k", line="by"), "heads", "score")
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
