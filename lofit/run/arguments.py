"""The arguments that the scripts have in common. What is left out gets its value later, from the
recipe, and is printed with its origin."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from lofit.errors import InputError
from lofit.llm.checkpoint import DTYPES
from lofit.llm.hub import local_folder

# of train.py: compare/baselines.py has all but the first
METHODS = ("lofit", "lora", "lora_rank1", "red", "bias", "post_block", "iti", "repe")


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    """For argparse: numbers of a kind (int, float) from low to high. what: they are called."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan is not
            raise argparse.ArgumentTypeError(f"expected {what}, found {text[:30]!r}")
        return value

    return parse


whole = _number(int, 0, 2**63 - 1, "a whole number")  # as torch's generators take it
natural = _number(int, 1, 2**31 - 1, "a whole number above 0")
positive = _number(float, 1e-12, 1e6, "a number above 0")  # float32 holds these, and their squares
not_negative = _number(float, 0, 1e6, "a number, 0 or above")


def common_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with what every script takes; `doc` is the script's own docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--model", default="weights/mini-llama", help="a folder, or a hub id, ID@REVISION"
        " (default: %(default)s)")  # fmt: skip
    arg("--task", default="mquake", help="mquake, clutrr, truthfulqa (its two folds), truthfulqa-0,"
        " truthfulqa-1, siqa, ..., or a folder with train.jsonl, val.jsonl and test.jsonl"
        " (default: %(default)s)")  # fmt: skip
    arg("--data", type=Path, default=local_folder("data/mini") or Path("data/mini"), help="folder"
        " that holds MQuAKE/, clutrr/, truthfulqa/, boolq/, ... (default: data/mini)")  # fmt: skip
    arg("--run", type=Path, help="run folder (default: runs/<model>/<task>)")
    arg("--seed", type=whole, default=42, help="of every draw (default: %(default)s)")
    arg("--chat", action="store_true", help="ask in the checkpoint's own chat template")
    arg("--plain", action="store_true", help="no shortcuts: the paper's batches, one text a row,"
        " every layer at every step")  # fmt: skip
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU"
        " where there is one)")  # fmt: skip
    arg("--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the base model's weights (default: auto, bfloat16 where it is fast)")  # fmt: skip
    arg("--quantize", choices=["nf4"], help="the base model's weights in 4 bits")
    arg("--shard", action="store_true", help="split the weights over the processes of torchrun")
    return parser


def training_parser(doc: str) -> argparse.ArgumentParser:
    """What both steps take as well; None: as the recipe says."""
    parser = common_parser(doc)
    arg = parser.add_argument
    arg("--n-train", type=natural, help="examples to train on, drawn by the seed (default: all)")
    arg("--lr", type=positive, help="peak learning rate (default: the recipe's)")
    arg("--epochs", type=natural, help="passes over the examples (default: the recipe's)")
    arg("--batch-size", type=natural, help="examples of a step (default: the recipe's)")
    arg("--accumulate", type=natural, default=1, help="parts of a batch, computed one after the"
        " other in less memory: the same gradient (default: %(default)s)")  # fmt: skip
    return parser


def refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, unused: dict[str, str]
) -> None:
    """InputError for a flag that was given and would change nothing; unused: name -> why."""
    for name, why in unused.items():
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')}: {why}; leave it out")


def shared_flags(args: argparse.Namespace, task: str) -> list[str]:
    """The flags that a next script must have too, of one task of --task."""
    words, defaults = [], common_parser("").parse_args([])
    values = vars(args) | {"task": args.task if Path(args.task).is_dir() else task}
    for name in ("model", "task", "data", "dtype", "device"):
        if values[name] != getattr(defaults, name):
            words += [f"--{name}", str(values[name])]
    words += ["--quantize", args.quantize] if args.quantize else []
    return words + [f"--{name}" for name in ("chat", "plain") if values[name]]
