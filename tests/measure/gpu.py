"""Everything that is to be checked and timed on a GPU, with CUDA graphs too.

python tests/measure/gpu.py all --out gpu-out             # one script, 10 minutes or so on 80 GB
python tests/measure/gpu.py all --device cpu --shape tiny      # its rehearsal
python tests/measure/gpu.py whole --shape 8b

graphs: the tests that need a GPU. same: heads and offsets on the GPU beside those on the CPU, fp32.
benchmark: training steps and decoding, eager, as CUDA graphs and compiled, beside transformers.
whole: the three scripts as a user calls them on as many items as MQuAKE has: seconds, and the peak
of the GPU's memory. shard: train.py in one process, under torchrun, and with --shard. all: these,
each in a process of its own with a limit of time.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from shapes import SHAPES, random_model

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from lofit.files import read_json, read_tensors  # noqa: E402
from lofit.llm.checkpoint import DTYPES  # noqa: E402
from lofit.llm.save import save_model  # noqa: E402

MINI = REPO / "weights" / "mini-llama"
MQUAKE = {"train": 134, "val": 95, "test": 864}  # the paper's numbers of items
# a script in a process of its own, which says the peak of the GPU's memory at its end
CHILD = """
import importlib, sys, torch
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
print(f"peak {peak}")
"""


def parts(args: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """Part -> (limit in seconds, command line of Python), in order. On a CPU: few of everything."""
    quick, me = args.device == "cpu", str(Path(__file__))
    at = ["--device", args.device, "--shape", args.shape, "--dtype", args.dtype]
    few = ["--share", "0.06"] if quick else []
    bench = [*at, "--rounds", "1", "--epochs", "1", "--out", str(args.out / "benchmark.json")]
    bench += ["--only", "selection", "greedy", "--no-peaks"] if quick else []
    found = {
        "graphs": (120, ["-m", "pytest", "-rs", "tests/test_graphs.py", "tests/test_decoding.py"]),
        "same": (90, [me, "same", *at]),
        "benchmark": (300, [str(REPO / "tests" / "measure" / "benchmark.py"), *bench]),
    }
    for name in ("whole", "shard"):
        found[name] = (240, [me, name, *at, *few])
    return {name: found[name] for name in args.only or found}


def everything(args: argparse.Namespace) -> int:
    """Run all parts, whatever becomes of each; the number of those that failed."""
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"--device {args.device}: there is no GPU; --device cpu rehearses all of it")
    args.out.mkdir(parents=True, exist_ok=True)
    summary, failed = [], 0
    for name, (limit, command) in parts(args).items():
        began, path = time.time(), args.out / f"{name}.txt"
        if args.device == "cpu" and name == "same":
            path.write_text("skipped: needs a GPU\n")
            continue
        with path.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPO, stdout=out, stderr=subprocess.STDOUT,
                env=environment(), start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit * args.patience)
            except subprocess.TimeoutExpired:
                code = "late"
            finally:
                if process.poll() is None:  # late, or this script was stopped
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        failed += code != 0
        summary.append(f"{name:12}{time.time() - began:8.1f} s  exit code {code}\n")
        print(f"== {name}\n{path.read_text(errors='replace')}{summary[-1]}", flush=True)
    (args.out / "summary.txt").write_text("".join(summary) + f"{failed} failed\n")
    return failed


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return {"LOFIT_CUDA_GRAPHS": "1"} | os.environ | {"PYTHONPATH": path}


def call(script: str, flags: list, processes: int = 0) -> str:
    """Run a script, under torchrun if there are processes; returns its seconds and its peak."""
    code = ["-c", CHILD, script]
    if processes:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        code = [*launch, "--", REPO / f"{script}.py"]
    began, command = time.time(), [str(word) for word in (sys.executable, *code, *flags)]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    peak = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    told = f"; peak {peak[0] / 1e9:.2f} GB" if any(peak) else ""
    return f"{time.time() - began:.1f} s{told}"


def apart(one: Path, other: Path) -> str:
    """How far the offsets of two runs are from one another."""
    (a, _), (b, _) = (read_tensors(run / "offsets.safetensors") for run in (one, other))
    if not torch.equal(a["heads"], b["heads"]):
        return "other heads"
    far, most = (a["offsets"] - b["offsets"]).abs().max(), a["offsets"].abs().max()
    return f"same heads, offsets {far:.1e} of {most:.2f}"


def same(args: argparse.Namespace) -> None:
    flags = ["--model", MINI, "--dtype", "float32", "--epochs", "1", "--n-train", "64"]
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", args.device):
            run = ["--run", Path(folder, device), "--device", device]
            for script in ("select_heads", "train"):
                print(f"{script} on {device}: {call(script, [*flags, *run])}", flush=True)
        print(apart(Path(folder, "cpu"), Path(folder, args.device)))


def checkpoint(args: argparse.Namespace, folder: Path) -> list:
    """Write random weights and as many items as MQuAKE has (a share of them); the scripts' flags
    for them."""
    dtype = DTYPES[args.dtype]
    model = random_model(SHAPES[args.shape], dtype, args.device)
    save_model(model, folder / "model", dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder / "model")
    del model
    if args.device != "cpu":
        torch.cuda.empty_cache()
    (folder / "data" / "MQuAKE").mkdir(parents=True)
    for split, n in MQUAKE.items():
        lines = (REPO / "data" / "mini" / "MQuAKE" / f"{split}.jsonl").read_text().splitlines()
        cases = [json.loads(line) for line in islice(cycle(lines), max(8, round(n * args.share)))]
        for i, case in enumerate(cases):  # as long as the paper's: 38 tokens on average
            case["requested_rewrite"][0]["subject"] += " of the city" * (i % 9)
        path = folder / "data" / "MQuAKE" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    flags = ["--model", folder / "model", "--data", folder / "data", "--device", args.device]
    return [*flags, "--dtype", args.dtype]


def whole(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        flags = [*checkpoint(args, Path(folder)), "--run", Path(folder, "run")]
        for script in ("select_heads", "train", "eval"):
            print(f"{script}: {call(script, flags)}", flush=True)
        results = read_json(Path(folder, "run", "results.json"))
        print(f"{results['n']} test items, {results['settings']}")


def shard(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        flags = checkpoint(args, Path(folder))
        flags += ["--heads", "random", "--n-train", "8", "--epochs", "1"]
        ways = {"one process": (0, []), "torchrun": (1, []), "--shard": (1, ["--shard"])}
        for way, (processes, more) in ways.items():
            told = call("train", [*flags, "--run", Path(folder, way), *more], processes)
            far = apart(Path(folder, "one process"), Path(folder, way))
            print(f"{way}: {told}; beside one process: {far}", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("what", choices=("all", "same", "whole", "shard"))
    arg("--device", default="cuda")
    arg("--shape", default="7b", choices=SHAPES)
    arg("--dtype", choices=DTYPES, help="(default: bfloat16, on a CPU float32)")
    arg("--share", type=float, default=1.0, help="of MQuAKE's items (default: all)")
    arg("--folder", help="on a disk with room for the weights, where they do not stay")
    arg("--out", type=Path, default=Path("runs/gpu"), help="of all: one text file a part")
    arg("--only", nargs="+", help="of all: these parts")
    arg("--patience", type=float, default=1.0, help="of all: times the limits of the parts")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.what == "all":
        return everything(args)
    {"same": same, "whole": whole, "shard": shard}[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
