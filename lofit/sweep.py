"""The whole job for several seeds and numbers of heads, beside as many random heads: one table.

    python -m lofit.sweep                      # runs/sweep/mini-llama/mquake/, about half an hour
    python -m lofit.sweep --seeds 42 --heads 3% 10% 20%

Each line is made by the three scripts, called as a person would call them; selection runs once per
seed, and its scores serve every number of heads.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from lofit import errors
from lofit.files import read_json
from lofit.report import mean

CHOICES = ("lofit", "random")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="weights/mini-llama")
    parser.add_argument("--task", default="mquake")
    parser.add_argument("--data", default="data/mini")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--heads", nargs="+", default=["10%", "3%"])
    parser.add_argument("--out", type=Path, help="default: runs/sweep/<model>/<task>")
    return parser.parse_args(argv)


def call(script: str, *args: str) -> None:
    """Run one of the scripts, its output kept for the case that it fails."""
    command = [sys.executable, script, *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise errors.InputError(f"{' '.join(command)} failed: {last[0].removeprefix('error: ')}")


def one_run(args: argparse.Namespace, out: Path, seed: int, k: str, choice: str) -> dict:
    """Train K heads of a choice with a seed and evaluate them; returns results.json."""
    common = ["--model", args.model, "--task", args.task, "--data", args.data, "--seed", str(seed)]
    selected, run = out / f"seed{seed}", out / f"seed{seed}-{choice}-{k}"
    if choice == "lofit" and k == args.heads[0]:
        call("select_heads.py", *common, "--run", str(selected), "--heads", k)
    source = str(selected) if choice == "lofit" else choice
    call("train.py", *common, "--heads", source, "--top", k, "--run", str(run))
    call("eval.py", *common, "--split", args.split, "--run", str(run))
    return read_json(run / "results.json")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = args.out or Path("runs/sweep") / args.model.rstrip("/").replace("/", "--") / args.task
    metric, base = None, None
    print(f"{args.model}, {args.task}, {args.split} split, seeds {args.seeds}")
    for k in args.heads:
        for choice in CHOICES:
            runs = [one_run(args, out, seed, k, choice) for seed in args.seeds]
            if metric is None:
                metric = next(iter(runs[0]["base"]))
                base = runs[0]["base"][metric]
                print(f"{metric}, base model: {base:.1%}")
            scores = [run["tuned"][metric] for run in runs]
            each = "  ".join(f"{score:6.1%}" for score in scores)
            print(
                f"{choice:7}{len(runs[0]['heads']):4} heads ({k}){runs[0]['trained_values']:7,}"
                f" values:  {each}   mean {mean(scores):6.1%}   {100 * (mean(scores) - base):+.1f}",
                flush=True,
            )


if __name__ == "__main__":
    errors.run(main)
