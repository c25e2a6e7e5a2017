"""What the scripts can be told in common: model, task, folders; and how they are read."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lofit.errors import InputError
from lofit.llm.checkpoint import DTYPES
from lofit.llm.folder import local_folder
from lofit.tasks import clutrr, mquake, truthfulqa
from lofit.tasks.own import OwnTask

TASKS = {"clutrr": clutrr, "mquake": mquake, "truthfulqa": truthfulqa}
Task = ModuleType | OwnTask


def common_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every script has. What is left out takes the value that is
    printed."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--model", default="weights/mini-llama", help="a folder or a hub id (default: %(default)s)")
    arg("--revision", help="branch, tag or commit of a hub id")
    arg(
        "--task",
        default="mquake",
        help=f"{', '.join(TASKS)}, or a folder with train.jsonl, val.jsonl, test.jsonl",
    )
    arg(
        "--data",
        type=Path,
        default=Path("data/mini"),
        help="folder that holds MQuAKE/, clutrr/, truthfulqa/ (default: %(default)s)",
    )
    arg(
        "--fold",
        default="both",
        choices=("0", "1", "both"),
        help="of a task with two folds (truthfulqa), each in a folder of its own",
    )
    arg("--chat", action="store_true", help="ask in the checkpoint's own chat template")
    arg("--seed", type=whole(0), default=42)
    arg("--run", type=Path, help="run folder (default: runs/<model>/<task>)")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arg("--dtype", default="auto", choices=["auto", *DTYPES], help="of the base model's weights")
    arg("--shard", action="store_true", help="split the weights over the processes of torchrun")
    arg("--fresh", action="store_true", help="start anew where a stopped run could go on")
    arg("--plain", action="store_true", help="leave out no work that could be, as the paper's code")
    parser.set_defaults(data=local_folder("data/mini") or Path("data/mini"))
    return parser


def whole(low: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least `low`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low}, found {text!r}")
        return int(text)

    return read


def real(text: str) -> float:
    """For argparse: a finite number above 0."""
    if real_or_0(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, found {text!r}")
    return float(text)


def real_or_0(text: str) -> float:
    """For argparse: a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected a finite number, not negative, found {text!r}")
    return value


def find_task(name: str) -> tuple[str, Task]:
    """(name for folders and files, task) of --task. InputError if it is neither."""
    if name in TASKS:
        return name, TASKS[name]
    if not Path(name).is_dir():
        raise InputError(
            f"--task {name}: neither one of {', '.join(TASKS)} nor a folder with train.jsonl"
        )
    return Path(name).resolve().name, OwnTask(Path(name))


def folds_of(args: argparse.Namespace) -> list[int | None]:
    """The folds to run one after the other; [None] for a task without folds."""
    folds = find_task(args.task)[1].FOLDS
    if folds is None:
        return [None]
    return list(folds) if args.fold == "both" else [int(args.fold)]


def run_folder(args: argparse.Namespace, suffix: str = "") -> Path:
    """--run, or runs/<model>/<task>."""
    if args.run:
        return args.run
    return Path("runs") / model_name(args).replace("/", "--") / (find_task(args.task)[0] + suffix)


def model_name(args: argparse.Namespace) -> str:
    """The last part of a folder's path, or the hub id."""
    folder = local_folder(args.model)
    return folder.resolve().name if folder else args.model
