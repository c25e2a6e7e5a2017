"""The whole job for every model, task, number of heads and seed, beside as many random heads.

    python -m lofit.studies.sweep              # both miniatures, all three tasks: runs/sweep/
    python -m lofit.studies.sweep --model weights/mini-llama --task mquake --heads 3% 10% 20%

Prints a Markdown table. Each score is made by the three scripts, called as a person would call
them; selection runs once per seed, and its scores serve every number of heads.
"""

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path

from lofit import errors
from lofit.files import read_json
from lofit.report import mean

CHOICES = ("lofit", "random")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--model", nargs="+", default=["weights/mini-llama", "weights/mini-gemma"])
    arg("--task", nargs="+", default=["mquake", "clutrr", "truthfulqa"])
    arg("--data", default="data/mini")
    arg("--split", default="test", choices=("val", "test"))
    arg("--seeds", nargs="+", type=int, default=[42, 43, 44])
    arg("--heads", nargs="+", default=["10%", "3%"])
    arg("--dtype", default="auto", help="of the base model's weights")
    arg("--out", type=Path, default=Path("runs/sweep"))
    return parser.parse_args(argv)


def call(script: str, *args: str) -> None:
    """Run one of the scripts, its output kept for the case that it fails."""
    command = [sys.executable, script, *args]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise errors.InputError(f"{' '.join(command)} failed: {last[0].removeprefix('error: ')}")


def all_runs(args: argparse.Namespace, model: str, task: str, k: str) -> dict[str, list[dict]]:
    """Train and evaluate K heads of each choice with each seed: choice -> results.json by seed.
    The scales are learnt with the first number of heads and serve the others."""
    out = args.out / model.rstrip("/").replace("/", "--") / task
    found: dict[str, list[dict]] = {choice: [] for choice in CHOICES}
    for choice, seed in itertools.product(CHOICES, args.seeds):
        common = ["--model", model, "--task", task, "--data", args.data, "--seed", str(seed)]
        common += ["--dtype", args.dtype]
        selected, run = out / f"seed{seed}", out / f"seed{seed}-{choice}-{k}"
        if choice == "lofit" and k == args.heads[0]:
            call("select_heads.py", *common, "--run", str(selected), "--heads", k)
        source = str(selected) if choice == "lofit" else choice
        call("train.py", *common, "--heads", source, "--top", k, "--run", str(run))
        call("eval.py", *common, "--split", args.split, "--run", str(run))
        found[choice].append(read_json(run / "results.json"))
    return found


def table_row(model: str, task: str, runs: dict[str, list[dict]]) -> str:
    """Results of each choice by seed -> a line of the table. The task's first metric is shown; of
    a task in folds, each of which has its own heads, the number in one fold."""
    first = runs[CHOICES[0]][0]
    metric, base = next(iter(first["base"].items()))
    k = len(first["heads"][0] if "folds" in first else first["heads"])
    cells = [Path(model).name, f"{task} ({metric})", f"{base:.1%}", str(k)]
    cells.append(f"{first['trained_values']:,}")
    for choice in CHOICES:
        scores = [run["tuned"][metric] for run in runs[choice]]
        each = " ".join(f"{100 * score:.1f}" for score in scores)
        gain = 100 * (mean(scores) - base)
        cells.append(f"{mean(scores):.1%} ({gain:+.1f}): {each}")
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.time()
    seeds = ", ".join(map(str, args.seeds))
    print(f"{args.split} split; after the mean and its points above the base: seeds {seeds}\n")
    print("| model | task | base | heads | values | LoFiT | random heads |")
    print("|---|---|---:|---:|---:|---|---|", flush=True)
    for model, task, k in itertools.product(args.model, args.task, args.heads):
        print(table_row(model, task, all_runs(args, model, task, k)), flush=True)
    print(f"\nin {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    errors.run(main)
