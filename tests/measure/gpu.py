"""What a GPU computes beside the CPU, and one process on it with --shard beside one without.

python tests/measure/gpu.py same --model weights/mini-gemma
python tests/measure/gpu.py shard

same: heads, offsets and validation scores of both steps on the GPU beside those on the CPU, few
examples and epochs of all tasks, fp32; shard: both steps at the shape of a 7B model in bf16, random
weights, in one process without torchrun, under it, and with --shard: seconds, the peak of the GPU's
memory, and how far apart scores and offsets are.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark_work import SHAPES, random_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for conftest
from conftest import MINI, REPO, end_group, start_group
from safetensors.torch import load_file

from lofit.llm.checkpoint import save_model
from lofit.llm.files import read_json
from lofit.run import session
from lofit.run.arguments import TASKS

WAYS = {"one process": (0, ()), "torchrun": (1, ()), "torchrun, --shard": (1, ("--shard",))}


def measured(script: str, flags: list[str]) -> None:
    """A script in this process: prints the seconds of opening the model and of the training loop,
    and the peak of the GPU's memory."""
    loop = 0.0

    def fit(*args):
        nonlocal loop
        steps = inner(*args)
        while True:
            start = time.perf_counter()
            epoch = next(steps, None)  # a step ends in numbers, so all of it has been computed
            loop += time.perf_counter() - start
            if epoch is None:
                return
            yield epoch

    module = importlib.import_module(script)
    inner, module.fit = module.fit, fit
    opened, began = [], time.perf_counter()

    class Session(session.Session):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append(time.perf_counter() - began)

    module.Session = Session
    module.main(flags)
    told = {"open": opened[0], "loop": loop, "peak": torch.cuda.max_memory_allocated()}
    sys.__stdout__.write(f"@{json.dumps(told)}\n")


def both_steps(n: int, flags: list[str], out: Path) -> tuple[list[dict], tuple]:
    """select_heads.py and train.py in one process, or under torchrun (n = 1): what each measured,
    and (scores [layer, head], heads [K, 2], offsets [K, head_dim], validation metrics)."""
    told = []
    for script in ("select_heads", "train"):
        call = [script, *flags, "--run", str(out)]
        call += ["--validate", "last"] if script == "train" else []
        if n:
            ended = end_group(start_group(n, ("gpu", ["in", *call])), 600)
        else:
            path = os.pathsep.join(map(str, (REPO, REPO / "tests")))
            done = subprocess.run(
                [sys.executable, __file__, "in", *call], capture_output=True, text=True,
                cwd=REPO, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
            ended = [(done.returncode, done.stdout, done.stderr)]
        assert not ended[0][0], ended
        line = next(x for x in ended[0][1].splitlines() if x.startswith("@"))
        told.append(json.loads(line[1:]))
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
    for task in TASKS:
        flags = ["--model", args.model, "--task", task, "--dtype", "float32", *args.little]
        flags += ["--fold", "0"] if TASKS[task].FOLDS else []
        with tempfile.TemporaryDirectory() as folder:
            cpu, gpu = (
                both_steps(0, [*flags, "--device", device], Path(folder, device))
                for device in ("cpu", "cuda")
            )
        metric = TASKS[task].MAIN_METRIC
        val = " and ".join(f"{run[1][3][metric]:.1%}" for run in (cpu, gpu))
        seconds = [" + ".join(f"{t['loop']:.1f}" for t in run[0]) for run in (cpu, gpu)]
        print(
            f"{Path(args.model).name}, {task}: {apart(cpu[1], gpu[1])}; val {metric} {val};"
            f" seconds of both loops {seconds[0]} and {seconds[1]} (CPU and GPU)",
            flush=True,
        )


def shard(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder, "model")
        dense = random_model(SHAPES[args.shape], torch.bfloat16, "cuda")
        n_bytes = sum(p.nbytes for p in dense.parameters())
        save_model(dense, model, torch.bfloat16)
        del dense
        torch.cuda.empty_cache()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINI / name, model)
        print(f"{args.shape}, bf16, {torch.cuda.get_device_name()}: {n_bytes / 1e9:.2f} GB")
        flags = ["--model", str(model), "--dtype", "bfloat16", "--device", "cuda", *args.little]
        first = None
        for name, (n, more) in WAYS.items():
            told, found = both_steps(n, [*flags, *more], Path(folder, name))
            first = first or found
            for step, t in zip(("selection", "offsets"), told, strict=True):
                print(
                    f"{name:18} {step:10} open {t['open']:5.1f} s, loop {t['loop']:6.2f} s,"
                    f" peak {t['peak'] / 1e9:.2f} GB",
                    flush=True,
                )
            print(f"{name:18} beside one process: {apart(first, found)}", flush=True)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("same", "shard"))
    parser.add_argument("--model", default="weights/mini-llama", help="of same")
    parser.add_argument("--shape", default="7b", choices=SHAPES, help="of shard")
    parser.add_argument("--n-train", default="64")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--folder", help="of shard: where its weights are written for a while")
    args = parser.parse_args(argv)
    args.little = ("--n-train", args.n_train, "--epochs", args.epochs)
    return args


def main(argv: list[str]) -> None:
    if argv and argv[0] == "in":
        return measured(argv[1], argv[2:])
    args = parse_args(argv)
    {"same": same, "shard": shard}[args.what](args)


if __name__ == "__main__":
    main(sys.argv[1:])
