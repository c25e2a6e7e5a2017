"""The arguments that the scripts have in common: model, task, folders; and how they are read."""

import argparse
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lofit.errors import InputError
from lofit.llm.checkpoint import DTYPES
from lofit.llm.folder import local_folder
from lofit.run.artefacts import OFFSETS
from lofit.tasks import clutrr, mquake, truthfulqa
from lofit.tasks.own import NAMED, OwnTask

TASKS = {"clutrr": clutrr, "mquake": mquake, "truthfulqa": truthfulqa}
Task = ModuleType | OwnTask
MAX_FLOAT = 1e6  # of a learning rate, a penalty or a strength; float32 overflows far beyond
CONTROLS = ("random", "all")  # choices of --heads that have a run folder of their own
METHODS = ("lofit", "lora", "red", "bias", "post_block", "iti", "repe")  # of train.py


def common_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every script has. Defaults are resolved later and printed
    with their origin."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--model", default="weights/mini-llama", help="a folder or a hub id (default: %(default)s)")
    arg("--revision", help="branch, tag or commit of a hub id")
    arg(
        "--task",
        default="mquake",
        help=f"{', '.join((*TASKS, *NAMED))}, or a folder with train.jsonl, val.jsonl, test.jsonl",
    )
    arg(
        "--data",
        type=Path,
        default=Path("data/mini"),
        help="folder that holds MQuAKE/, clutrr/, truthfulqa/, boolq/, ... (default: %(default)s)",
    )
    arg(
        "--fold",
        default="both",
        choices=("0", "1", "both"),
        help="of a task with two folds (truthfulqa), each in a folder of its own",
    )
    arg("--chat", action="store_true", help="ask in the checkpoint's own chat template")
    arg("--seed", type=int_at_least(0, 2**63 - 1), default=42)
    arg("--run", type=Path, help="run folder (default: runs/<model>/<task>)")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arg("--dtype", default="auto", choices=["auto", *DTYPES], help="of the base model's weights")
    arg("--shard", action="store_true", help="split the weights over the processes of torchrun")
    arg("--max-length", type=int_at_least(2), help="tokens of an example to train on (default: the"
        " paper's 400, 512 with DPO, for its tasks; else the model's positions)")  # fmt: skip
    arg("--fresh", action="store_true", help="start again where a stopped run could continue")
    arg(
        "--plain",
        action="store_true",
        help="no shortcuts: one text a row, every layer, the paper's batches",
    )
    parser.set_defaults(data=local_folder("data/mini") or Path("data/mini"))
    return parser


def int_at_least(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """For argparse: an integer from `low` to `high`."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}, found {text[:30]!r}"
            )
        return int(text)

    return read


def positive_float(text: str) -> float:
    """For argparse: a number above 0, up to MAX_FLOAT."""
    if nonnegative_float(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return float(text)


def nonnegative_float(text: str) -> float:
    """For argparse: a number from 0 to MAX_FLOAT."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_FLOAT:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1e6, found {text[:30]!r}")
    return value


def find_task(name: str) -> tuple[str, Task]:
    """(name for folders and files, task) of --task. InputError if it is neither."""
    if name in TASKS or name in NAMED:
        return name, (TASKS | NAMED)[name]
    if not Path(name).is_dir():
        names = ", ".join((*TASKS, *NAMED))
        raise InputError(f"--task {name}: neither one of {names} nor a folder with train.jsonl")
    return Path(name).resolve().name, OwnTask(Path(name))


def folds_of(args: argparse.Namespace) -> list[int | None]:
    """The folds to run one after the other; [None] for a task without folds."""
    folds = find_task(args.task)[1].FOLDS
    if folds is None and args.fold != "both":
        raise InputError(f"--fold: the task {args.task} has no folds; leave it out")
    if folds is None:
        return [None]
    return list(folds) if args.fold == "both" else [int(args.fold)]


def run_folder(args: argparse.Namespace, suffix: str = "") -> Path:
    """--run, or runs/<model>/<task>."""
    if args.run:
        return args.run
    return Path("runs") / model_name(args).replace("/", "--") / (find_task(args.task)[0] + suffix)


def train_suffix(args: argparse.Namespace) -> str:
    """What train.py adds to the name of the run folder: a control or another method has its own."""
    if args.method != "lofit":
        return f"-{args.method}"
    return f"-{args.heads}" if args.heads in CONTROLS else ""


def eval_command(args: argparse.Namespace) -> str:
    """The command that evaluates what train.py with these arguments has just trained."""
    words, defaults = ["python", "eval.py"], common_parser("").parse_args([])
    for name in ("model", "revision", "task", "data", "fold", "dtype", "device"):
        value = getattr(args, name)
        words += [] if value == getattr(defaults, name) else [f"--{name}", str(value)]
    words += [f"--{name}" for name in ("chat", "plain") if getattr(args, name)]
    if args.run or train_suffix(args):
        words += ["--run", str(run_folder(args, train_suffix(args)))]
    return shlex.join(words)


def trained_folders(args: argparse.Namespace) -> list[Path]:
    """The run folders of this model and task that hold offsets, the one trained last first. Only
    --run, if it is given."""
    folder = run_folder(args)
    names = [""] if args.run else ["", *(f"-{name}" for name in (*CONTROLS, *METHODS[1:]))]
    times = {}
    for candidate in (folder.with_name(folder.name + name) for name in names):
        files = [*candidate.glob(OFFSETS), *candidate.glob(f"fold*/{OFFSETS}")]
        if files:
            times[candidate] = max(file.stat().st_mtime_ns for file in files)
    return sorted(times, key=times.get, reverse=True)


def model_name(args: argparse.Namespace) -> str:
    """The last part of a folder's path, or the hub id."""
    folder = local_folder(args.model)
    return folder.resolve().name if folder else args.model
