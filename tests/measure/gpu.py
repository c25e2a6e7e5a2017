"""Everything that is to be checked and timed on a GPU.

python tests/measure/gpu.py all --out gpu-out          # one script, 5 minutes or so on 80 GB
python tests/measure/gpu.py all --device cpu --shape small     # its rehearsal
python tests/measure/gpu.py same --model weights/mini-gemma
python tests/measure/gpu.py steps --shape 8b
python tests/measure/gpu.py decoding
python tests/measure/gpu.py whole --shape 13b
python tests/measure/gpu.py shard

same: heads, offsets and validation scores of both steps on the GPU beside those on the CPU, few
examples and epochs of all tasks, fp32. The others are at the shape of a large model with random
weights, in bf16 on a GPU. steps: training steps as CUDA graphs beside the padded ones that they
replay and beside eager: losses and gradients, then milliseconds; decoding: the same of a decoding
step; whole: the three scripts as a user calls them, cold, on as many items as MQuAKE has: seconds
by part; shard: both steps in one process without torchrun, under it, and with --shard: seconds by
part, the peak of the GPU's memory, how far apart scores and offsets are.
all: these and the benchmark, each in a process of its own with a limit of time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gpu_scripts
import gpu_steps
import torch
from conftest import REPO
from shapes import SHAPES

from lofit.llm.checkpoint import DTYPES
from lofit.run.arguments import TASKS

HERE = Path(__file__).parent
NEEDS_A_GPU = ("same", "compiled")  # on a CPU compiling takes minutes


def parts(args: argparse.Namespace, folder: str) -> dict[str, tuple[int, list[str]]]:
    """Part -> (limit in seconds, command line of Python), in order. On a CPU: few of everything."""
    gpu, at = str(HERE / "gpu.py"), ["--device", args.device, "--shape", args.shape]
    little, quick = ["--n-train", "16", "--epochs", "1"], args.device == "cpu"
    kept = [*at, "--folder", folder]
    few = ["--rounds", "1"] if quick else []
    work = ["selection", "greedy"] if quick else ["selection", "offsets", "greedy", "choices"]
    bench = ["--dtype", args.dtype, "--rounds", "1", "--epochs", "2", "--only", *work]
    bench += ["--out", str(Path(folder, "benchmark.json")), *(["--no-peaks"] if quick else [])]
    two, patient = ["one process", "torchrun, --shard"], str(round(60 * args.patience))
    found = {
        "graphs": (75, ["-m", "pytest", "-rs", "tests/test_graphs.py", "tests/test_decoding.py"]),
        "same": (60, [gpu, "same", "--tasks", "mquake", *little, "--device", args.device]),
        "steps": (60, [gpu, "steps", *at, "--dtype", args.dtype, *few]),
        "decoding": (45, [gpu, "decoding", *at, "--dtype", args.dtype, *few]),
        "benchmark": (150, [str(HERE / "benchmark.py"), *at, *bench]),
        "whole": (150, [gpu, "whole", *kept, *(["--share", "0.06"] if quick else [])]),
        "shard": (100, [gpu, "shard", *kept, *little, "--limit", patient, "--ways", *two]),
    }
    words = ["--compile", "--only", "selection", "8 x 64"]
    found["compiled"] = (90, [gpu, "steps", *at, "--dtype", args.dtype, *words])
    return {name: found[name] for name in args.only or found}


def tee(command: list[str], limit: float, path: Path) -> int:
    """Run a command; its output goes to the screen and to a file as it comes. Exit code; that of
    SIGKILL if it was still running after `limit` seconds, and so ended, with all that it began."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        cwd=REPO, env=env, start_new_session=True,
    )  # fmt: skip
    late = threading.Timer(limit, os.killpg, (process.pid, 9))
    late.start()
    try:
        with path.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        return process.wait()
    finally:
        late.cancel()
        if process.poll() is None:  # this script was stopped
            os.killpg(process.pid, 9)


def everything(args: argparse.Namespace) -> int:
    """Run all parts, whatever becomes of each; the number of those that failed."""
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"--device {args.device}: there is no GPU; --device cpu rehearses all of it")
    args.out.mkdir(parents=True, exist_ok=True)
    rows, failed, name = [], 0, gpu_scripts.device_name(args.device)
    head = f"{args.shape}, {args.dtype}, {name}, torch {torch.__version__}\n"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, (limit, command) in parts(args, folder).items():
            path, began = args.out / f"{name}.txt", time.time()
            print(f"\n== {name}, at most {limit:.0f} s ==", flush=True)
            if args.device == "cpu" and name in NEEDS_A_GPU:
                print("skipped: needs a GPU", flush=True)
                path.write_text("skipped: needs a GPU\n")
                rows.append((name, "skipped: needs a GPU", 0.0))
                continue
            code = tee([sys.executable, *command], args.patience * limit, path)
            seconds = time.time() - began
            late = code == -9 and seconds >= args.patience * limit
            failed += code != 0
            rows.append((name, "late" if late else f"exit code {code}", seconds))
        for path in Path(folder).glob("*.json"):
            (args.out / path.name).write_bytes(path.read_bytes())
    summary = "".join(f"{name:12}{seconds:8.1f} s  {end}\n" for name, end, seconds in rows)
    summary += f"{'all':12}{sum(row[2] for row in rows):8.1f} s  {failed} failed\n"
    (args.out / "summary.txt").write_text(head + summary)
    print(f"\n== summary ==\n{head}{summary}-> {args.out}/", flush=True)
    return failed


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("what", choices=("all", "same", "steps", "decoding", "whole", "shard"))
    arg("--device", default="cuda")
    arg("--shape", default="7b", choices=SHAPES, help="of all but same")
    arg("--dtype", choices=DTYPES, help="of steps and decoding (bfloat16; float32 on a CPU)")
    arg("--model", default="weights/mini-llama", help="of same")
    arg("--tasks", nargs="+", default=[*TASKS], choices=TASKS, help="of same")
    arg("--n-train", default="64", help="of same and shard")
    arg("--epochs", default="2", help="of same and shard")
    arg("--rounds", type=int, default=20, help="of steps and decoding")
    arg("--tokens", type=int, default=33, help="of decoding")
    arg(
        "--limit",
        type=int,
        default=600,
        help="of same, whole and shard: seconds of a script, after which it prints where it is",
    )
    arg("--share", type=float, default=1.0, help="of whole: of MQuAKE's items")
    arg("--ways", nargs="+", default=[*gpu_scripts.WAYS], choices=gpu_scripts.WAYS, help="of shard")
    arg("--folder", help="of whole and shard: where the weights are written, and stay; of all: a"
        " folder on a disk with room for them, where they do not stay")  # fmt: skip
    arg("--out", type=Path, default=Path("runs/gpu"), help="of all: one text file a part")
    arg("--only", nargs="+", help="of all: these parts; of steps: words in the names of some")
    arg("--compile", action="store_true", help="of steps: with compiled layers too")
    arg("--patience", type=float, help="of all: times the limits of the parts (1; 4 on a CPU)")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.patience = args.patience or (4.0 if args.device == "cpu" else 1.0)
    args.little = ("--n-train", args.n_train, "--epochs", args.epochs)
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.what == "all":
        return everything(args)
    both = {"steps": gpu_steps.steps, "decoding": gpu_steps.decoding}
    both |= {name: getattr(gpu_scripts, name) for name in ("same", "whole", "shard")}
    both[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
