"""Times the work of LoFiT against stock transformers and peft, and against what the machine can do.

python tests/measure/benchmark.py                          # CPU, fp32, a model of 58 M parameters
python tests/measure/benchmark.py --device cuda --shape 7b --dtype bfloat16
python tests/measure/benchmark.py --model weights/smollm2-135m-instruct --data data/real --epochs 1

Needs transformers and peft. The sides take turns within one run; medians are over rounds, with the
smallest and the largest. Before anything is timed, losses, tokens and scores are compared.
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from benchmark_work import SHAPES, Bench, Ids

from lofit.fast.packed import packed_weights
from lofit.heads import attach_offsets, attach_scales, init_scales
from lofit.llm.checkpoint import DTYPES
from lofit.llm.config import ModelConfig
from lofit.objectives import CrossEntropy

PEAKS = {"selection step": "step", "offsets, upper half": "upper", "offsets, all layers": "all"}
Side = tuple[Callable[[], object], float]  # what is timed, and what its time is multiplied by


def seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_flops(config: ModelConfig, tokens: int, pairs: int, targets: int, first: int = 0):
    """FLOPs of the matrix products that no forward pass through layers first, first + 1, ... can
    leave out: o_proj and MLP of the last layer, and lm_head, where a token is predicted.

    pairs: of a token and one that it attends to.
    """
    D, layers = config.hidden_size, config.num_hidden_layers - first
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    into = 2 * tokens * D * (q + 2 * kv) + 4 * q * pairs
    out = 2 * (q * D + 3 * D * config.intermediate_size)
    last = targets * (out + 2 * D * config.vocab_size)
    return layers * into + (layers - 1) * tokens * out + last


def training_flops(config: ModelConfig, lengths: list[int], targets: int, first: int = 0) -> float:
    """The same of a training step: no gradient of weights, and none below the attention's output in
    layer `first`. Backward, attention has four products, the others one each."""
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    forward = forward_flops(config, tokens, pairs, targets, first)
    D, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv, layers = config.num_key_value_heads * config.head_dim, config.num_hidden_layers - first
    return 2 * forward + (layers - 2) * 4 * q * pairs - 2 * tokens * D * (q + 2 * kv)


def limits(bench: Bench) -> dict[str, Callable[[float, float], float]]:
    """Work -> the least seconds it can take, given FLOP/s and bytes/s of the machine."""
    config, step = bench.config, CrossEntropy(bench.model, Ids(), bench.step, "step")
    rows = CrossEntropy(bench.model, Ids(), bench.examples, "examples").rows
    lengths, targets = [len(ids) for ids, _ in rows], sum(y >= 0 for _, ys in rows for y in ys)

    def training(where: str) -> Callable[[float, float], float]:
        first = min(layer for layer, _ in bench.heads[where])  # what lies below runs once
        tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        below = forward_flops(config, tokens, pairs, 0) - forward_flops(
            config, tokens, pairs, 0, first
        )
        flops = below + bench.epochs * training_flops(config, lengths, targets, first)
        return lambda rate, bandwidth: flops / rate

    def greedy(rate: float, bandwidth: float) -> float:
        n = [len(prompt) for prompt in bench.prompts]
        prompt = forward_flops(config, sum(n), sum(k * (k + 1) // 2 for k in n), 16)
        tokens = [forward_flops(config, 16, sum(n) + 16 * i, 16) for i in range(1, 16)]
        return prompt / rate + sum(max(t / rate, n_bytes / bandwidth) for t in tokens)

    def choices(rate: float, bandwidth: float) -> float:
        shared = bench.shared
        flops = forward_flops(config, shared, shared * (shared + 1) // 2, 0)
        for question, answers in bench.asked:
            own = [len(answer.split()) for answer in answers]
            before, tokens = len(question.split()) - shared, sum(own)
            pairs = sum(k * (shared + before) + k * (k + 1) // 2 for k in [before, *own])
            flops += forward_flops(config, before + tokens, pairs, tokens)
        return flops / rate

    n_bytes = sum(p.nbytes for p in bench.model.parameters()) - bench.model.lm_head.weight.nbytes
    one = training_flops(config, step.lengths, step.weight(list(range(8))))
    return {
        "selection step": lambda rate, bandwidth: one / rate,
        "offsets, upper half": training("upper"),
        "offsets, all layers": training("all"),
        "greedy, 16 x 16 tokens": greedy,
        "choices, 50 questions": choices,
        "decoding step": lambda rate, bandwidth: n_bytes / bandwidth,
    }


def matrix_product(
    bench: Bench, dtype: torch.dtype, packed: bool
) -> tuple[Callable[[], object], float]:
    """(an MLP's product on 1024 tokens, its FLOPs): the rate that the machine is measured by. Of
    packed weights it is the faster one, and the one that evaluation uses."""
    D, inner = bench.config.hidden_size, bench.config.intermediate_size
    x = torch.randn(1024, D, device=bench.device, dtype=dtype)
    linear = torch.nn.Linear(D, inner, bias=False, device=bench.device, dtype=dtype)
    linear.requires_grad_(False)
    repeats = max(1, int(2e10 / (2 * 1024 * D * inner)))

    def run() -> None:
        with packed_weights(linear) if packed else nullcontext():
            for _ in range(repeats):
                linear(x)

    return run, repeats * 2 * 1024 * D * inner


def big_copy(device: str) -> tuple[Callable[[], object], float]:
    """(a copy far larger than the caches, bytes read and written)."""
    source = torch.ones(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def works(bench: Bench) -> dict[str, Callable[[], dict[str, Side]]]:
    """Each piece of work: side -> how it is done. Made when its turn comes."""

    def sides(make: Callable[[str], Callable], *names: str) -> dict[str, Side]:
        return {side: (make(side), 1.0) for side in names}

    def training(where: str) -> Callable[[], dict[str, Side]]:
        return lambda: sides(lambda side: bench.training(side, where), "ours", "hf", "lora")

    found = {
        "selection step": lambda: sides(bench.selection, "ours", "hf", "lora"),
        "offsets, upper half": training("upper"),
        "offsets, all layers": training("all"),
        "greedy, 16 x 16 tokens": lambda: sides(bench.greedy, "ours", "hf"),
        "choices, 50 questions": lambda: {  # theirs takes minutes: 2 of the 50 questions
            "ours": (bench.choices("ours", slice(50)), 1.0),
            "hf": (bench.choices("hf", slice(2)), 25.0),
        },
    }
    if bench.device != "cpu":
        found["decoding step"] = lambda: {"ours": (bench.decode(), 1 / 128)}
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
        ours = objective.loss(list(range(8))).item()
        assert math.isclose(ours, theirs, rel_tol=tolerance), (where, ours, theirs)
    scores = check_scores(bench, tolerance)
    one, other = (bench.greedy(side)() for side in ("ours", "hf"))
    same = sum(a == b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    n = 16 * len(one)
    print(f"checked: losses within {tolerance:g}, {scores}; {same} of {n} greedy tokens equal")


def check_scores(bench: Bench, tolerance: float) -> str:
    """One question's answers; says what was seen. In less than fp32 both sides round: ours may be
    no further from the scores in fp32 than 1.5 times as far as theirs."""

    def scores(side: str) -> torch.Tensor:
        return torch.tensor(bench.choices(side, slice(1))()[0])

    ours, theirs, rounded = scores("ours"), scores("hf"), bench.model
    if rounded.lm_head.weight.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
        return f"scores within {tolerance:g}"
    bench.model = copy.deepcopy(rounded).float()
    exact, bench.model = scores("ours"), rounded
    far = [(side - exact).abs().max().item() for side in (ours, theirs)]
    assert far[0] <= 1.5 * far[1], far
    return f"scores {far[0]:.2g} from those in fp32 (theirs {far[1]:.2g})"


def peak_memory(side: str, work: str, args: argparse.Namespace) -> float:
    """MiB beyond weights and data at the peak of one run, in a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, "--shape", args.shape]
    command += ["--dtype", args.dtype, "--threads", str(args.threads), "--peak", side, work]
    if args.model:
        command += ["--model", str(args.model), "--data", str(args.data), "--task", args.task]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(bench: Bench, side: str, work: str) -> None:
    run = bench.selection(side) if work == "step" else bench.training(side, work, epochs=1)
    if bench.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return

    def kilobytes(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind))

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = kilobytes("VmRSS")
    run()
    print((kilobytes("VmHWM") - before) / 1024)


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
    if "mib" in record:
        cells.append(f"{record['mib']:9.0f}")
    return f"{record['work']:24}{record['side']:6}{''.join(cells)}"


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
    copy, n_bytes = big_copy(args.device)
    columns = "".join(f"{name:>9}" for name in ("median s", "from", "to", "ratio", "limit", "MiB"))
    print(f"\n{'':24}{'side':6}{columns}")
    least, records = limits(bench), []
    for title, make in works(bench).items():
        if args.only and not any(word in title for word in args.only):
            continue
        product, flops = matrix_product(bench, dtype, packed=title not in PEAKS)
        machine = {"product": (product, 1.0), "copy": (copy, 1.0)}
        times = measure(make() | machine, args.rounds, args.device)
        medians = {side: statistics.median(values) for side, values in times.items()}
        rate, bandwidth = flops / medians.pop("product"), n_bytes / medians.pop("copy")
        for side, median in medians.items():
            record = {"work": title, "side": side, "seconds": median, "rounds": times[side]}
            record |= {"ratio": median / medians["ours"], "flops": rate, "bandwidth": bandwidth}
            record["share"] = least[title](rate, bandwidth) / median
            if title in PEAKS:
                record["mib"] = peak_memory(side, PEAKS[title], args)
            records.append(record)
            print(table_row(record), flush=True)
        print(f"{'':24}matrix product {rate / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.0f} GB/s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(vars(args) | {"results": records}, default=str))


if __name__ == "__main__":
    main()
