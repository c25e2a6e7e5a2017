"""Is it better than the others? LoFiT beside baselines, each tuned by as many trials on validation.

python -m lofit.studies.methods --model weights/mini-llama --task mquake
"""

import argparse
from pathlib import Path

from lofit import errors
from lofit.llm.files import read_json
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
    summary,
    write_table,
)  # fmt: skip

# of train.py --method: what is tried on validation
GRIDS = {
    "lora": ("--lr", ["1e-4", "5e-4", "2e-3"]),
    "red": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "bias": ("--lr", ["1e-3", "5e-3", "2e-2"]),
    "iti": ("--alpha", ["5", "15", "30"]),
    "repe": ("--alpha", ["0.5", "2", "8"]),
}
ABOUT = (
    "{split} split; mean score, points above the base [95 % interval over the items]: seeds"
    " {seeds}. Beside it the mean less LoFiT's at {heads} of heads. The learning rate (of iti and"
    " repe the strength) is the best on validation with the first seed, of {n} for LoFiT and 3 for"
    " others; seconds are those of one selection and one training"
)
HEADER = ["model", "task", "method", "values", "seconds", "score", "less LoFiT", "chosen"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.add_argument("--heads", nargs="+", default=["10%", "3%", "all"], help="of LoFiT")
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    return parser.parse_args(argv)


def methods_arg(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """--methods of the studies that set several beside one another."""
    help = f'"lofit K", {", ".join(GRIDS)}; others are compared with the first'
    parser.add_argument("--methods", nargs="+", default=default, help=help)


def known_methods(args: argparse.Namespace) -> argparse.Namespace:
    """The same; raises InputError for a method that there is not."""
    for method in args.methods:
        if method not in GRIDS and not method.startswith("lofit "):
            raise errors.InputError(f'--methods {method}: expected "lofit K", {", ".join(GRIDS)}')
    return args


def run_of(plan: Plan, setting: Setting, method: str, extra: tuple[str, ...] = ()) -> Trials:
    """One run: "lofit K" (K may be all) or a baseline. extra: flags of selection and training, like
    --n-train; they name the folder too."""
    name, _, k = method.partition(" ")
    suffix = "".join(extra).replace("--", "-")
    if name == "lofit":
        chosen = plan.selection(setting, "scales", *extra, name=f"scales{suffix}")
        return plan.lofit(setting, "scales", k, chosen, extra)
    flag, values = GRIDS[name]
    tried = [(flag, value) for value in values]
    return plan.trials(setting, name + suffix, ("--method", name, *extra), tried)


def row_of(settings: list[Setting], method: str, runs: list[Trials], best: list[Trials]) -> dict:
    """Summary of a method's runs, and what they are above those of LoFiT; {} if none is done."""
    metric = find_task(settings[0].task)[1].MAIN_METRIC
    folders = [trials.results() for trials in runs]
    found = summary(folders, metric)
    if found is None:
        return {}
    done = next(folder for folder in folders if (folder / "results.json").exists())
    row = {"model": Path(settings[0].model).name, "task": settings[0].task, "metric": metric}
    row |= {"method": method, "values": read_json(done / "results.json")["trained_values"]}
    row |= {"seconds": [trials.seconds() for trials in runs], "score": found}
    lofit = [trials.results() for trials in best]
    row["less_lofit"] = compare(folders, lofit, metric) if best != runs else None
    return row | {"chosen": chosen_flags(folders)}


def as_text(row: dict) -> list[str]:
    less = row["less_lofit"]
    return [
        row["model"], f"{row['task']} ({row['metric']})", row["method"], f"{row['values']:,}",
        f"{min(row['seconds']):.0f}", cell(row["score"]),
        points(*less.values()) if less else "–", " ".join(row["chosen"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan = Plan(args)
    names = [f"lofit {k}" for k in args.heads] + args.methods
    runs = [
        (settings, {name: [run_of(plan, s, name) for s in settings] for name in names})
        for settings in plan.settings()
    ]
    failed = run_cells(plan.cells, args.jobs, args.device)
    rows = [
        row_of(settings, name, each, of[names[0]])
        for settings, of in runs
        for name, each in of.items()
    ]
    rows = [row for row in rows if row]
    seeds, n = " ".join(map(str, args.seeds)), len(args.lr_factors)
    about = ABOUT.format(split=args.split, seeds=seeds, heads=args.heads[0], n=n)
    write_table(args.out, "methods", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    lines = lines_of(rows, x="method", line="task")
    picture(args.out / "methods.png", lines, "method", "score", joined=False)
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
