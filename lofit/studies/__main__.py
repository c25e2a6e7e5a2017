"""The studies behind docs/results.md; docs/tables.md has all that they print.

    python -m lofit.studies sweep               # the table of what is recorded
    python -m lofit.studies sweep --missing     # a shell line for each run that is not
    python -m lofit.studies heads --model weights/mini-llama --task mquake

Studies: sweep, heads, methods, tasks, data, transfer, forgets, rules, quantized, layers; verdicts
compares runs.
docs/results/README.md says how to run the lines.
"""

import argparse
from pathlib import Path

from lofit import errors
from lofit.studies import verdicts
from lofit.studies.cells import missing_lines
from lofit.studies.grid import STUDIES
from lofit.studies.records import Records
from lofit.studies.tables import markdown


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    for name, study in STUDIES.items():
        arg = studies.add_parser(name, description=study.about).add_argument
        arg("--model", nargs="+", default=["weights/mini-llama", "weights/mini-gemma"])
        arg("--task", nargs="+", default=["mquake", "clutrr", "truthfulqa"])
        arg("--data", default="data/mini")
        arg("--seeds", nargs="+", type=int, default=[42, 43, 44])
        arg("--dtype", default="float32", help="of the base model's weights (default: %(default)s)")
        factors = [1.0] if name in ("sweep", "tasks", "rules", "quantized") else [0.3, 1.0, 3.0]
        arg("--lr-factors", nargs="+", type=float, default=factors,
            help="of the recipe's offset lr: the first seed's best on validation")  # fmt: skip
        for script in ("select", "train"):
            text = 'more flags of its calls, like "--epochs 5"'
            arg(f"--{script}-flags", default="", help=text)
        arg("--missing", action="store_true", help="print shell lines instead of the table")
        arg("--records", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
        for flag, about in study.arguments.items():
            arg(flag, **about)
    arg = studies.add_parser("verdicts", description=verdicts.__doc__).add_argument
    arg("--records", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    if args.study != "verdicts":
        args.seeds = list(dict.fromkeys(args.seeds))
    return args


def caption_and_table(args: argparse.Namespace) -> tuple[str, str]:
    """Of a study, of what is recorded."""
    records = Records(args.records)
    if args.study == "verdicts":
        return verdicts.__doc__.strip(), verdicts.table(records)
    study = STUDIES[args.study]
    values = vars(args) | {"seeds": " ".join(map(str, args.seeds))}
    header = [title.format(**values) for title in (*study.labels, *study.columns)]
    table = markdown(header, study.table(study.rows(args), records))
    return f"{study.about.format(**values)}.", table


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not getattr(args, "missing", False):
        print(*caption_and_table(args), sep="\n\n")
        return
    picks = (pick for row in STUDIES[args.study].rows(args) for pick in row.picks)
    for line in missing_lines(picks, Records(args.records)):
        print(line)


if __name__ == "__main__":
    errors.run(main)
