"""What several processes cost and hold, beside one.

python tests/measure/parallel.py weights --processes 2 4 --gigabytes 2
python tests/measure/parallel.py step
python tests/measure/parallel.py training --model weights/smollm2-135m-instruct --data data/real
python tests/measure/parallel.py same --model weights/mini-gemma --n-train 40

weights: what each process keeps of a random bf16 checkpoint with --shard, and its peak in loading
it, in running a text through it and in a training step, with the pages of the mapped files, which
the system takes back, and without; seconds of a pass, and of gathering lm_head alone; step:
`lofit.inspect.memory` beside the measured peak of a step of selection, as the C library keeps what
was freed, and with that given back at once (as in `weights`); training: wall and CPU seconds of
offset training in one process, in two, and of two runs in one process each at the same time, which
the machine's memory slows too; and the bytes sent; same: heads and offsets of both steps in two and
three processes beside those in one, of all tasks.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for conftest
from conftest import end_group, random_model, start_group
from loading import memory, write_checkpoint
from lofit.distributed.sharded import Shards, gathered
from lofit.llm.files import read_json
from safetensors.torch import load_file

from lofit.heads import attach_scales, init_scales
from lofit.inspect.memory import training_bytes
from lofit.llm.batches import collate
from lofit.llm.checkpoint import assemble, text_name
from lofit.llm.config import ModelConfig
from lofit.llm.model import CausalLM
from lofit.llm.scoring import target_losses
from lofit.run.arguments import TASKS
from lofit.run.summary import mean

SIZES = {"small": (256, 8), "middle": (512, 8), "large": (1024, 8)}  # hidden size, layers
# glibc: memory that was freed goes back to the system, and is not kept for the next tensor
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def config_of(hidden: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, head_dim=64, max_position_embeddings=2048,
        rms_norm_eps=1e-5, eos_token_id=(2,),
    )  # fmt: skip


def restart_peak() -> int:
    """Let VmHWM start anew; returns the present size."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


class Peak:
    """Inside, `found` is the peak of this process's own memory (in samples) and of all (VmHWM), in
    bytes beyond what it began with."""

    def __enter__(self) -> "Peak":
        self.all, self.own = restart_peak(), memory("RssAnon")
        self.highest, self.through = self.own, threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.through.wait(0.002):
            self.highest = max(self.highest, memory("RssAnon"))

    def __exit__(self, *_) -> None:
        self.through.set()
        self.thread.join()
        self.found = self.highest - self.own, memory("VmHWM") - self.all


def hold(folder: str) -> None:
    """One process of `weights`: prints what it keeps, its peaks, and seconds."""
    shards, path, ids = Shards("cpu"), Path(folder), torch.ones(1, 8, dtype=torch.int64)
    config = ModelConfig.from_file(path / "config.json")
    with Peak() as loading:
        model = assemble(folder, None, path, config, text_name, torch.bfloat16, "cpu", shards)
    kept = sum(p.to_local().nbytes for p in model.parameters())
    with torch.no_grad(), Peak() as running, gathered(model):
        model.logits(model.model(ids))
    with torch.no_grad(), gathered(model):
        a_pass = median_seconds(lambda: model.logits(model.model(ids)))
        model.reshard()
        a_gathering = median_seconds(lambda: (model.unshard(), model.reshard()))
    attach_scales(model, init_scales(model, 0))
    batch = collate([([1] * 8, [-100] * 4 + [1] * 4)], "cpu")
    with Peak() as training, gathered(model):
        target_losses(model, batch).mean().backward()
    peaks = *loading.found, *(kept + n for n in (*running.found, *training.found))
    sys.__stdout__.write(" ".join(map(str, (kept, *peaks, a_pass, a_gathering))) + "\n")


def median_seconds(call: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return sorted(found)[times // 2]


def weights(args: argparse.Namespace) -> None:
    os.environ |= GIVE_BACK
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = 2 * write_checkpoint(Path(folder), args.gigabytes, 5)
        print(f"{n_bytes / 1e9:.2f} GB of bf16 weights")
        config = ModelConfig.from_file(Path(folder) / "config.json")
        with torch.device("meta"):
            block = 2 * sum(p.numel() for p in CausalLM(config).model.layers[0].parameters())
        for n in args.processes:
            ended = end_group(start_group(n, ("parallel", ["hold", folder])), 600)
            assert not any(code for code, _, _ in ended), ended
            found = [list(map(float, out.split())) for _, out, _ in ended]
            *most, a_pass, a_gathering = [max(column) for column in zip(*found, strict=True)]
            kept, load, load_mapped, run, run_mapped, step, step_mapped = (
                f"{size / n_bytes:.1%}" for size in most
            )
            print(
                f"{n} processes, of the weights: kept {kept}, peak of loading {load} (with mapped"
                f" files {load_mapped}), of a pass {run} ({run_mapped}), of a training step {step}"
                f" ({step_mapped}); 1/N and a block are {1 / n + block / n_bytes:.1%}; a pass takes"
                f" {a_pass:.2f} s, of which gathering lm_head {a_gathering:.2f} s",
                flush=True,
            )


def one_step(size: str) -> None:
    """One process of `step`: a step's peak beyond the model, and what the plan says."""
    config = config_of(*SIZES[size])
    model = random_model(config).requires_grad_(False)
    parameters = attach_scales(model, init_scales(model, 0))
    text = ([1] * 128, [-100] * 112 + [1] * 16)
    target_losses(model, collate([text], "cpu")).mean().backward()  # what libraries take for good
    before = restart_peak()
    target_losses(model, collate([text] * 8, "cpu")).mean().backward()
    measured = memory("VmHWM") - before + 4 * sum(p.nbytes for p in parameters)
    planned = training_bytes(config, torch.float32, 8, 128, 16)
    print(
        f"{size}{', freed at once' if GIVE_BACK.items() <= os.environ.items() else ''}: measured"
        f" {measured / 1e6:.0f} MB, plan {planned / 1e6:.0f} MB, {planned / measured - 1:+.1%}",
        flush=True,
    )


def step(args: argparse.Namespace) -> None:
    for size in SIZES:  # each in a process of its own, whose peak is then the step's
        for more in ({}, GIVE_BACK):
            command = [sys.executable, __file__, "one", size]
            subprocess.run(command, check=True, env=os.environ | more)


def timed(flags: list[str]) -> None:
    """One process of `training`: seconds of the training loop, without validation; bytes sent."""
    import train

    inner = train.fit

    def fit(training, on_step):
        steps, wall, cpu = inner(training, on_step), 0.0, 0.0
        while True:
            began = time.perf_counter(), time.process_time()
            epoch = next(steps, None)
            wall, cpu = wall + time.perf_counter() - began[0], cpu + time.process_time() - began[1]
            if epoch is None:
                break
            yield epoch
        told = {"wall": wall, "cpu": cpu, "sent": getattr(training.objective, "bytes_sent", {})}
        sys.__stdout__.write(f"@{json.dumps(told)}\n")

    train.fit = fit
    train.main(flags)


def training(args: argparse.Namespace) -> None:
    flags = ["--model", args.model, "--data", str(args.data), "--heads", "random"]
    flags += ["--n-train", str(args.n_train), "--epochs", str(args.epochs)]
    flags += ["--dtype", args.dtype, "--validate", "last", "--fresh", "--run"]
    kinds = {"1 process": (1, 1), "2 processes": (2, 1), "2 runs at the same time": (1, 2)}
    for _, (name, (n, runs)) in itertools.product(range(args.rounds), kinds.items()):
        with tempfile.TemporaryDirectory() as folder:
            calls = [("parallel", ["timed", *flags, f"{folder}/{i}"]) for i in range(runs)]
            groups = [start_group(n, call) for call in calls]
            ended = [end for group in groups for end in end_group(group, 900)]
        assert not any(code for code, _, _ in ended), ended
        lines = "".join(out for _, out, _ in ended).splitlines()
        each = [json.loads(line[1:]) for line in lines if line.startswith("@")]
        wall, cpu = (mean([e[kind] for e in each]) for kind in ("wall", "cpu"))
        print(f"{name}: wall {wall:.1f} s, CPU {cpu:.1f} s, sent {each[0]['sent']}", flush=True)


def both_steps(n: int, model: str, task: str, more: list[str], out: Path) -> tuple:
    """(scores [layer, head], heads, offsets [K, head_dim]) of both steps in n processes."""
    flags = ["--model", model, "--task", task, "--dtype", "float32", "--run", str(out), *more]
    flags += ["--fold", "0"] if TASKS[task].FOLDS else []
    calls = ("select_heads", flags), ("train", [*flags, "--validate", "last"])
    ended = end_group(start_group(n, *calls), 3000)
    assert not any(code for code, _, _ in ended), ended
    found = load_file(next(out.rglob("offsets.safetensors")))
    scores = torch.tensor(read_json(next(out.rglob("heads.json")))["scores"])
    return scores, found["heads"], found["offsets"]


def same(args: argparse.Namespace) -> None:
    more = ["--n-train", str(args.n_train), "--epochs", str(args.epochs)]
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            runs = [both_steps(n, args.model, task, more, Path(folder, str(n))) for n in (1, 2, 3)]
        for n, (scores, heads, offsets) in enumerate(runs[1:], start=2):
            far = (scores - runs[0][0]).abs().max(), (offsets - runs[0][2]).abs().max()
            print(
                f"{task}, {n} processes: heads {'same' if heads.equal(runs[0][1]) else 'differ'},"
                f" scores {far[0]:.1e}, offsets {far[1]:.1e} of {offsets.abs().max():.2f}",
                flush=True,
            )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("weights", "step", "training", "same"))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--model", default="weights/mini-llama")
    parser.add_argument("--data", type=Path, default=Path("data/mini"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n-train", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    inner = {"hold": lambda flags: hold(*flags), "timed": timed, "one": lambda f: one_step(*f)}
    if argv and argv[0] in inner:
        return inner[argv[0]](argv[1:])
    args = parse_args(argv)
    {"weights": weights, "step": step, "training": training, "same": same}[args.what](args)


if __name__ == "__main__":
    main(sys.argv[1:])
