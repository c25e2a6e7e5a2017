"""The three scripts as a user calls them, each in a process of its own, in seconds by part; and
what is made of that: a GPU beside the CPU, --shard beside one process, a whole experiment."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for conftest
from conftest import MINI, REPO, end_group, start_group
from lofit.llm.files import read_json
from safetensors.torch import load_file
from shapes import SHAPES, random_model
from timed_script import BEGAN, LIMIT, PARTS

from lofit.llm.checkpoint import DTYPES, save_model
from lofit.run.arguments import TASKS

CHILD = Path(__file__).with_name("timed_script.py")
WAYS = {"one process": (0, ()), "torchrun": (1, ()), "torchrun, --shard": (1, ("--shard",))}
MQUAKE = {"train": 134, "val": 95, "test": 864}  # the paper's numbers of items


def call(n: int, script: str, flags: list[str], limit: int) -> dict:
    """A script in one process, or in n as torchrun starts them: its seconds by part, peak of the
    GPU's memory in bytes, [] without one: of tensors, and as taken of the device. After `limit`
    seconds it says where it is, and this script ends."""
    began, words = time.time(), [script, *flags]
    os.environ |= {BEGAN: str(began), LIMIT: str(limit)}
    if n:
        ended = end_group(start_group(n, ("timed_script", words)), 600)
    else:
        done = subprocess.run(
            [sys.executable, CHILD, *words], capture_output=True, text=True, cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
        )  # fmt: skip
        ended = [(done.returncode, done.stdout, done.stderr)]
    code, out, err = ended[0]
    if code:
        sys.exit(f"{script} {' '.join(flags)} ended with {code}:\n{out[-1000:]}\n{err}")
    told = json.loads(next(x for x in out.splitlines() if x.startswith("@"))[1:])
    told["seconds"]["end"] = time.time() - began - sum(told["seconds"].values())
    return told


def in_a_line(told: dict) -> str:
    """Total, the parts that took time, the peak."""
    seconds = told["seconds"]
    parts = ", ".join(f"{name} {s:.2f}" for name, s in seconds.items() if s >= 0.005)
    peak = "".join(f"; peak {n / 1e9:.2f} GB" for n in told["peak"][:1])
    return f"{sum(seconds.values()):7.2f} s: {parts}{peak}"


def say(line: str) -> None:
    print(line, flush=True)


def both_steps(
    n: int, flags: list[str], out: Path, limit: int, tell: Callable[[str], object]
) -> tuple:
    """select_heads.py and train.py in one process, or under torchrun (n = 1): what each measured,
    and (scores [layer, head], heads [K, 2], offsets [K, head_dim], validation metrics)."""
    told = []
    for script in ("select_heads", "train"):
        more = ["--validate", "last"] if script == "train" else []
        told.append(call(n, script, [*flags, "--run", str(out), *more], limit))
        tell(f"{script:13} {in_a_line(told[-1])}")
    found = load_file(next(out.rglob("offsets.safetensors")))
    scores = torch.tensor(read_json(next(out.rglob("heads.json")))["scores"])
    val = read_json(next(out.rglob("lofit_config.json")))["val"]
    return told, (scores, found["heads"], found["offsets"], val)


def apart(one: tuple, other: tuple) -> str:
    """How far two runs of both steps are from one another."""
    heads = len({*map(tuple, one[1].tolist())} & {*map(tuple, other[1].tolist())})
    same = "same heads" if one[1].equal(other[1]) else f"{heads} of {len(one[1])} heads the same"
    scores = f"scores {(one[0] - other[0]).abs().max():.1e} of {one[0].abs().max():.2f}"
    if not one[1].equal(other[1]):
        return f"{same}, {scores}"
    far, most = (one[2] - other[2]).abs().max(), one[2].abs().max()
    return f"{same}, {scores}, offsets {far:.1e} of {most:.2f}"


def same(args: argparse.Namespace) -> None:
    for task in args.tasks:
        flags = ["--model", args.model, "--task", task, "--dtype", "float32", *args.little]
        flags += ["--fold", "0"] if TASKS[task].FOLDS else []
        with tempfile.TemporaryDirectory() as folder:
            cpu, gpu = (
                both_steps(0, [*flags, "--device", device], Path(folder, device), args.limit, str)
                for device in ("cpu", args.device)
            )
        metric = TASKS[task].MAIN_METRIC
        val = " and ".join(f"{run[1][3][metric]:.1%}" for run in (cpu, gpu))
        loops = [
            [t["seconds"]["loop"] + t["seconds"]["capture"] for t in run[0]] for run in (cpu, gpu)
        ]
        seconds = [" + ".join(f"{s:.1f}" for s in run) for run in loops]
        print(
            f"{Path(args.model).name}, {task}: {apart(cpu[1], gpu[1])}; val {metric} {val};"
            f" seconds of both loops {seconds[0]} and {seconds[1]} (CPU and {args.device})",
            flush=True,
        )


@contextmanager
def checkpoint(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """(model folder, folder for what is made) of random weights, drawn on the device. They stay in
    --folder, for the next command that names it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary, args.shape)
        if not (folder / "config.json").exists():  # written last
            began, dtype = time.time(), DTYPES["float32" if args.device == "cpu" else "bfloat16"]
            model = random_model(SHAPES[args.shape], dtype, args.device)
            n_bytes = sum(p.nbytes for p in model.parameters())
            for name in ("tokenizer.json", "tokenizer_config.json"):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(MINI / name, folder)
            save_model(model, folder, dtype)
            del model
            told = f"{n_bytes / 1e9:.2f} GB in {time.time() - began:.1f} s"
            say(f"random weights of shape {args.shape}: {told}")
        if args.device != "cpu":
            torch.cuda.empty_cache()
        yield folder, Path(temporary)


def device_name(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name()


def shard(args: argparse.Namespace) -> None:
    with checkpoint(args) as (model, folder):
        dtype = read_json(model / "config.json")["dtype"]
        say(f"{args.shape}, {dtype}, {device_name(args.device)}")
        flags = ["--model", str(model), "--dtype", dtype, "--device", args.device, *args.little]
        first = None
        for name in args.ways:
            n, more = WAYS[name]
            say(f"{name}:")
            _, found = both_steps(n, [*flags, *more], folder / name, args.limit, say)
            first = first or found
            say(f"{name}, beside {args.ways[0]}: {apart(first, found)}")


def write_mquake(folder: Path, share: float) -> None:
    """MQuAKE's number of items (a share of them), the miniature's texts, repeated and made as long
    as the paper's are for their tokenizers: 38 tokens on average, 23 to 57."""
    (folder / "MQuAKE").mkdir(parents=True)
    for split, n in MQUAKE.items():
        lines = (REPO / "data" / "mini" / "MQuAKE" / f"{split}.jsonl").read_text().splitlines()
        cases = [json.loads(line) for line in islice(cycle(lines), max(8, round(n * share)))]
        for i, case in enumerate(cases):
            case["requested_rewrite"][0]["subject"] += " of the city" * (i % 9)
        text = "".join(json.dumps(case) + "\n" for case in cases)
        (folder / "MQuAKE" / f"{split}.jsonl").write_text(text)


def whole(args: argparse.Namespace) -> None:
    """What a user waits for: the three scripts with their defaults, cold."""
    with checkpoint(args) as (model, folder):
        write_mquake(folder / "data", args.share)
        flags = [
            "--model",
            str(model),
            "--data",
            str(folder / "data"),
            "--run",
            str(folder / "run"),
        ]
        told = {}
        for script in ("select_heads", "train", "eval"):
            told[script] = call(0, script, [*flags, "--device", args.device], args.limit)
            say(f"{script:13} {in_a_line(told[script])}")
        settings = read_json(folder / "run" / "results.json")["settings"]
    items = ", ".join(f"{max(8, round(n * args.share))} {split}" for split, n in MQUAKE.items())
    print(
        f"\n{args.shape}, {settings['dtype']}, {device_name(args.device)}, MQuAKE-sized ({items}),"
        " no answer ends early"
    )
    print(f"{'seconds':32}" + "".join(f"{name:>14}" for name in (*told, "all")))
    rows = {title: [t["seconds"][part] for t in told.values()] for part, title in PARTS.items()}
    rows["what a user waits for"] = [sum(t["seconds"].values()) for t in told.values()]
    for title, seconds in rows.items():
        print(f"{title:32}" + "".join(f"{s:14.2f}" for s in (*seconds, sum(seconds))))
