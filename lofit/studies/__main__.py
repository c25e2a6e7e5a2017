"""The studies behind docs/results.md.

    python -m lofit.studies sweep              # both miniatures, all three tasks
    python -m lofit.studies heads --model weights/mini-llama --task mquake
    python -m lofit.studies sweep --jobs 0     # the table of what is recorded; runs nothing

Studies: sweep, heads, methods, tasks, data, transfer, forgets, layers.
"""

import argparse
from pathlib import Path

from lofit import errors
from lofit.run.arguments import int_at_least
from lofit.studies.grid import STUDIES
from lofit.studies.records import Records
from lofit.studies.runner import run_missing
from lofit.studies.tables import markdown

INTERVALS = "Intervals: 95 %, over items and runs. °: of one run, without how runs vary."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    for name, study in STUDIES.items():
        sub = studies.add_parser(name, description=study.about)
        arg = sub.add_argument
        arg("--model", nargs="+", default=["weights/mini-llama", "weights/mini-gemma"])
        arg("--task", nargs="+", default=["mquake", "clutrr", "truthfulqa"])
        arg("--data", default="data/mini")
        arg("--seeds", nargs="+", type=int, default=[42, 43, 44])
        arg("--dtype", default="float32", help="of the base model's weights (default: %(default)s)")
        arg("--lr-factors", nargs="+", type=float, default=[0.3, 1.0, 3.0],
            help="of the recipe's offset lr: the first seed's best on validation")  # fmt: skip
        for script in ("select", "train"):
            text = 'more flags of its calls, like "--epochs 5"'
            arg(f"--{script}-flags", default="", help=text)
        arg("--device", default="auto")
        arg(
            "--jobs",
            type=int_at_least(0),
            default=1,
            help="calls side by side; 0: print what is recorded",
        )
        arg("--records", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
        for flag, about in study.arguments.items():
            arg(flag, **about)
        if name in ("sweep", "tasks"):
            sub.set_defaults(lr_factors=[1.0])
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def printed(args: argparse.Namespace, records: Records) -> str:
    """A study's caption and table, of what is recorded."""
    study = STUDIES[args.study]
    values = vars(args) | {"seeds": " ".join(map(str, args.seeds))}
    header = [title.format(**values) for title in (*study.labels, *study.columns)]
    table = markdown(header, study.table(study.rows(args), records))
    about = study.about.format(**values)
    about += f". {INTERVALS}" if "interval" in about else "."
    return f"{about}\n\n{table}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    records, rows = Records(args.records), list(STUDIES[args.study].rows(args))
    picks = dict.fromkeys(p for row in rows for p in (*row.picks, *row.less, *row.others))

    def missing() -> list:
        return [call for pick in picks for call in pick.missing(records)]

    failed = run_missing(missing, records, args.jobs, args.device)
    print(f"\n{printed(args, records)}")
    if failed:
        raise errors.InputError(
            f"calls that failed: {failed}; see their logs, then start the study again"
        )


if __name__ == "__main__":
    errors.run(main)
