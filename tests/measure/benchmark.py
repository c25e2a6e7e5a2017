"""Times the work of LoFiT against stock transformers and peft, and against what the machine can do.

python tests/measure/benchmark.py                          # CPU, fp32, a model of 58 M parameters
python tests/measure/benchmark.py --device cuda --shape 7b --dtype bfloat16
python tests/measure/benchmark.py --model weights/smollm2-135m-instruct --data data/real --epochs 1

Needs transformers and peft. The sides take turns within one run; medians are over rounds, with the
smallest and the largest. Before anything is timed, losses, tokens and scores are compared.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from benchmark_limits import big_copies, limits, matrix_products, seconds
from benchmark_work import EAGER, Bench
from shapes import SHAPES, Ids

from lofit.heads import attach_offsets, attach_scales, init_scales
from lofit.llm.checkpoint import DTYPES
from lofit.llm.model import CausalLM
from lofit.llm.scoring import score_answers
from lofit.objectives import CrossEntropy

PEAKS = {"selection step": "step", "offsets, upper half": "upper", "offsets, all layers": "all"}
Side = tuple[Callable[[], object], float]  # what is timed, and what its time is multiplied by


def works(bench: Bench) -> dict[str, Callable[[], dict[str, Side]]]:
    """Each piece of work: side -> how it is done. Made when its turn comes."""

    ours = ("ours", EAGER) if bench.graphs else ("ours",)

    def sides(make: Callable[[str], Callable], *names: str) -> dict[str, Side]:
        return {side: (make(side), 1.0) for side in names}

    def training(where: str) -> Callable[[], dict[str, Side]]:
        return lambda: sides(lambda side: bench.training(side, where), *ours, "hf", "lora")

    found = {
        "selection step": lambda: sides(bench.selection, *ours, "hf", "lora"),
        "offsets, upper half": training("upper"),
        "offsets, all layers": training("all"),
        "greedy, 16 x 16 tokens": lambda: sides(bench.greedy, *ours, "hf"),
        "choices, 50 questions": lambda: {  # theirs takes minutes: 2 of the 50 questions
            "ours": (bench.choices("ours", slice(50)), 1.0),
            "hf": (bench.choices("hf", slice(2)), 25.0),
        },
    }
    if bench.graphs:
        found["decoding step"] = lambda: {
            side: (bench.decode(side), 1 / 128) for side in ("ours", "compiled")
        }
    return found


def check(bench: Bench, tolerance: float) -> None:
    """All sides compute the same: losses, and scores. Raises AssertionError."""
    objective = CrossEntropy(bench.model, Ids(), bench.step, "step")
    for where in (None, "upper", "all"):
        _, loss = bench.theirs("hf", objective, lambda: range(8), where)
        with torch.no_grad():
            theirs = loss().item()
        if where is None:
            attach_scales(bench.model, init_scales(bench.model, 0))
        else:
            attach_offsets(bench.model, bench.heads[where], bench.offsets(where))
        for side in ("ours", EAGER):
            ours = bench.replayed(side, objective).loss(list(range(8))).item()
            assert math.isclose(ours, theirs, rel_tol=tolerance), (where, side, ours, theirs)
    scores = check_scores(bench, tolerance)
    with bench.during:
        one, other = (bench.greedy(side)() for side in ("ours", "hf"))
    same = sum(a == b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    n = 16 * len(one)
    print(f"checked: losses within {tolerance:g}, {scores}; {same} of {n} greedy tokens equal")


def check_scores(bench: Bench, tolerance: float) -> str:
    """One question's answers; says what was seen. In less than fp32 both sides round: ours may be
    no further from the scores in fp32 than 1.5 times as far as theirs."""

    def scores(side: str) -> torch.Tensor:
        return torch.tensor(bench.choices(side, slice(1))()[0])

    theirs, ours, rounded = scores("hf"), scores("ours"), bench.model
    if rounded.lm_head.weight.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
        return f"scores within {tolerance:g}"
    with layers_in_fp32(rounded):
        exact = torch.tensor(score_answers(rounded, Ids(), bench.asked[:1], 64, "")[0])
    far = [(side - exact).abs().max().item() for side in (ours, theirs)]
    assert far[0] <= 1.5 * far[1], far
    return f"scores {far[0]:.2g} from those in fp32 (theirs {far[1]:.2g})"


@contextmanager
def layers_in_fp32(model: CausalLM) -> Iterator[None]:
    """Inside, the model computes in fp32: a layer is cast when it runs, for two models of this size
    would not fit one GPU. Afterwards it has the tensors that it had, which its twins share."""
    had = {p: p.data for p in model.parameters()}

    def cast(part: torch.nn.Module, *_) -> None:
        for p in part.parameters():
            p.data = p.data.float()

    def back(part: torch.nn.Module, *_) -> None:
        for p in part.parameters():
            p.data = had[p]

    hooks = [layer.register_forward_pre_hook(cast) for layer in model.model.layers]
    hooks += [layer.register_forward_hook(back) for layer in model.model.layers]
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        cast(part)
    try:
        yield
    finally:
        back(model)
        for hook in hooks:
            hook.remove()


def peak_memory(side: str, work: str, args: argparse.Namespace) -> float:
    """MiB beyond weights and data at the peak of one run on the CPU, in a process of its own."""
    command = [sys.executable, __file__, "--shape", args.shape]
    command += ["--dtype", args.dtype, "--threads", str(args.threads), "--peak", side, work]
    if args.model:
        command += ["--model", str(args.model), "--data", str(args.data), "--task", args.task]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def one_run(bench: Bench, side: str, work: str) -> Callable[[], object]:
    """What a peak is taken of."""
    return bench.selection(side) if work == "step" else bench.training(side, work, epochs=1)


def print_peak(bench: Bench, side: str, work: str) -> None:
    run = one_run(bench, side, work)

    def kilobytes(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind))

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = kilobytes("VmRSS")
    run()
    print((kilobytes("VmHWM") - before) / 1024)


def gpu_peak(bench: Bench, side: str, work: str) -> dict[str, float]:
    """The same on a GPU, in this process: MiB of tensors, and MiB that torch took of the device for
    them, which a graph keeps between its replays."""
    run = one_run(bench, side, work)
    gc.collect()  # the graphs of the rounds before
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run()
    after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    mib, taken = ((b - a) / 2**20 for a, b in zip(before, after, strict=True))
    return {"mib": mib, "taken": taken}


def measure(sides: dict[str, Side], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each round, the sides in turn; one more round warms up."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, (run, factor) in sides.items():
            times[side].append(seconds(run, device) * factor)
    return {side: values[1:] for side, values in times.items()}


def table_row(record: dict) -> str:
    """One side of one piece of work. ratio: its time over ours; limit: the least time that the
    work can take on this machine over its time."""
    cells = [f"{t:9.3f}" for t in (record["seconds"], min(record["rounds"]), max(record["rounds"]))]
    cells.append(f"{record['ratio']:9.2f}")
    cells.append(f"{record['share']:9.0%}")
    cells += [f"{record[name]:9.0f}" for name in ("mib", "taken") if name in record]
    return f"{record['work']:24}{record['side']:12}{''.join(cells)}"


def columns(args: argparse.Namespace) -> list[str]:
    memory = ["MiB"] if args.device == "cpu" else ["MiB", "taken"]
    return ["median s", "from", "to", "ratio", "limit", *(memory if not args.no_peaks else [])]


def timed(bench: Bench, title: str, make: Callable, args: argparse.Namespace) -> list[dict]:
    """The records of all sides of one piece of work; prints them."""
    sides, records = make(), []
    with matrix_products(bench, DTYPES[args.dtype], title not in PEAKS) as (products, flops):
        copies, n_bytes = big_copies(args.device)
        machine = {"products": (products, 1.0), "copies": (copies, 1.0)}
        with bench.during:
            times = measure(sides | machine, args.rounds, args.device)
    medians = {side: statistics.median(values) for side, values in times.items()}
    rate, bandwidth = flops / medians.pop("products"), n_bytes / medians.pop("copies")
    least = limits(bench)[title](rate, bandwidth)
    del sides, products, copies, machine  # and the memory that they hold
    for side, median in medians.items():
        record = {"work": title, "side": side, "seconds": median, "rounds": times[side]}
        record |= {"ratio": median / medians["ours"], "share": least / median}
        record |= {"flops": rate, "bandwidth": bandwidth}
        if title in PEAKS and not args.no_peaks:
            work = PEAKS[title]
            on_cpu = args.device == "cpu"
            record |= (
                {"mib": peak_memory(side, work, args)} if on_cpu else gpu_peak(bench, side, work)
            )
        records.append(record)
        print(table_row(record), flush=True)
    print(
        f"{'':24}matrix products {rate / 1e9:.0f} GFLOP/s, copies {bandwidth / 1e9:.0f} GB/s",
        flush=True,
    )
    return records


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--model", help="a folder, instead of a shape: real weights and texts")
    parser.add_argument("--data", type=Path, default=Path("data/mini"), help="with --model")
    parser.add_argument("--task", default="mquake", choices=("mquake", "clutrr"))
    parser.add_argument("--epochs", type=int, default=5, help="of offset training")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="on CPU")
    parser.add_argument("--only", nargs="*", help="words in the names of the work to do")
    parser.add_argument("--no-peaks", action="store_true", help="measure no memory")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    shape, real = args.model or args.shape, (args.data, args.task, args.epochs)
    if args.peak:
        side, work = args.peak
        return print_peak(Bench(shape, args.device, dtype, side, *real), side, work)
    bench = Bench(shape, args.device, dtype, "ours hf lora", *real)
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{args.threads} CPU threads"
    told = f"{Path(shape).name}, {args.task}, epochs {args.epochs}" if args.model else shape
    print(f"{told}, {args.dtype}, {name}, torch {torch.__version__}, {args.rounds} rounds")
    check(bench, 1e-4 if dtype == torch.float32 else 2e-2)
    records = []
    print(f"\n{'':24}{'side':12}{''.join(f'{name:>9}' for name in columns(args))}")
    for title, make in works(bench).items():
        if not args.only or any(word in title for word in args.only):
            records += timed(bench, title, make, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(vars(args) | {"results": records}, default=str))


if __name__ == "__main__":
    main()
