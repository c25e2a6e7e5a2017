"""How many examples does it take? LoFiT and baselines on 10, 25, 50, 100 ... of a shuffle.

python -m lofit.studies.data --model weights/mini-llama --task mquake
"""

import argparse

from lofit import errors
from lofit.studies.cells import finish, run_cells
from lofit.studies.methods import known_methods, methods_arg, row_of, run_of
from lofit.studies.plan import Plan, study_parser
from lofit.studies.tables import cell, lines_of, markdown, picture, points, write_table

ABOUT = (
    "{split} split; mean score, points above the base [95 % interval over the items]: seeds"
    " {seeds}. Beside it the mean less {first}'s. Heads are selected, and a learning rate chosen on"
    " the whole validation split with the first seed, for each number of examples"
)
HEADER = ["model", "task", "examples", "method", "score", "less {first}", "chosen"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.add_argument("--examples", nargs="+", default=["10", "25", "50", "100", "all"])
    methods_arg(parser, ["lofit 10%", "lora", "red"])
    return known_methods(parser.parse_args(argv))


def as_text(row: dict) -> list[str]:
    less = row["less_lofit"]
    return [
        row["model"], f"{row['task']} ({row['metric']})", row["examples"], row["method"],
        cell(row["score"]), points(*less.values()) if less else "–", " ".join(row["chosen"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan, rows = Plan(args), []
    runs = []
    for settings in plan.settings():
        for n in args.examples:
            extra = () if n == "all" else ("--n-train", n)
            of = {m: [run_of(plan, s, m, extra) for s in settings] for m in args.methods}
            runs.append((settings, n, of))
    failed = run_cells(plan.cells, args.jobs, args.device)
    for settings, n, of in runs:
        for method, each in of.items():
            if row := row_of(settings, method, each, of[args.methods[0]]):
                rows.append(row | {"examples": n})
    seeds, first = " ".join(map(str, args.seeds)), args.methods[0]
    about = ABOUT.format(split=args.split, seeds=seeds, first=first)
    header = [title.format(first=first) for title in HEADER]
    write_table(args.out, "data", about, markdown(header, map(as_text, rows)), rows, argv)
    lines = lines_of(rows, x="examples", line="method")
    picture(args.out / "data.png", lines, "training examples", "score")
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
