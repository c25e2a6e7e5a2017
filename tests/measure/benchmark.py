"""Times the work of LoFiT against stock transformers with hooks and peft's LoRA.

python tests/measure/benchmark.py                          # CPU, fp32, a model of 58 M parameters
python tests/measure/benchmark.py --device cuda --shape 7b --dtype bfloat16
python tests/measure/benchmark.py --model weights/smollm2-135m-instruct --data data/real --epochs 1

Needs transformers and peft. The sides take turns within one run; medians are over rounds, with the
smallest and the largest. Before anything is timed, losses, tokens and scores are compared. With
LOFIT_CUDA_GRAPHS=1 a GPU has sides of their own with graphs and with the compiled decoding step.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import (
    hf_batch,
    hf_generate,
    hf_score,
    hf_twin,
    hook_offsets,
    hook_scales,
    lora,
    unhook,
)
from shapes import SHAPES, Ids, random_model, text

from lofit import load_model, load_tokenizer
from lofit.fast.decoding import GraphedDecoding, compiled_step
from lofit.fast.graphs import GraphedObjective
from lofit.fast.hidden_cache import HiddenCache
from lofit.fast.packed import packed_weights
from lofit.heads import attach_offsets, attach_scales, every_head, head_grid, random_init
from lofit.llm.checkpoint import DTYPES
from lofit.llm.generate import Decoding, generate_all
from lofit.llm.scoring import score_answers
from lofit.objectives import CrossEntropy
from lofit.run.setup import uses_graphs
from lofit.tasks import find_tasks
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step

OURS = ("ours", "graphs", "compiled")  # the last one only decodes
WORKS = ("selection step", "offsets, upper half", "offsets, all layers", "greedy, 16 x 16 tokens",
         "choices, 50 questions")  # fmt: skip
ASKED_OF_HF = 2  # of the 50 questions: theirs takes minutes


class Bench:
    """The model, its twins and the data; each method gives one side of one piece of work."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype):
        torch.manual_seed(0)
        self.device, self.epochs = args.device, args.epochs
        if args.model:
            self.model = load_model(args.model, dtype, args.device)
            self.real_texts(load_tokenizer(args.model), args)
        else:
            self.model = random_model(SHAPES[args.shape], dtype, args.device)
            self.random_texts(random.Random(0), self.model.config.vocab_size)
        self.prompts = [[*map(int, prompt.split())] for prompt, _ in self.examples[:16]]
        layers, n = head_grid(self.model)
        self.heads = {
            "upper": [(layer, 0) for layer in range(layers // 2, layers)],
            "all": [(layer, layer % n) for layer in range(layers)],
        }
        self.twin = hf_twin(self.model)
        self.lora, self.lora_parameters = lora(hf_twin(self.model))
        self.compiled = Decoding(compiled_step())
        self.ours = OURS[:2] if uses_graphs(self.model) else OURS[:1]

    def random_texts(self, rng: random.Random, vocabulary: int) -> None:
        """8 texts of 128 tokens with 8 to predict; as many examples as MQuAKE has, lengths drawn;
        50 questions of 416 tokens, 401 of them shared, with 8 answers each."""

        def draw(low: int, high: int | None = None) -> str:
            return text(rng, rng.randint(low, high) if high else low, vocabulary)

        self.step = [(" 1" + draw(119), draw(7)) for _ in range(8)]
        self.examples = [(" 1" + draw(28, 60), draw(2, 5)) for _ in range(134)]
        start = " 1" + draw(400)
        answers = [[draw(5, 15) for _ in range(8)] for _ in range(50)]
        self.asked = [(start + draw(15), each, False) for each in answers]

    def real_texts(self, tokenizer, args: argparse.Namespace) -> None:
        """The task's training texts, the first 8 for a step; 50 questions of TruthfulQA."""

        def as_ids(prompt: str, answer: str) -> tuple[str, str]:
            ids, n = tokenizer.encode_pair(prompt, answer)
            return tuple("".join(f" {i}" for i in part) for part in (ids[:n], ids[n:]))

        def read(name: str, split: str) -> list:
            task = find_tasks(name)[0]
            return task.read(task.file(args.data, split), split, 0)

        self.examples = [as_ids(e.prompt, e.answer) for e in read(args.task, "train")]
        self.step, self.asked = self.examples[:8], []
        for e in read("truthfulqa-0", "test")[:50]:
            pairs = [as_ids(e.question, answer) for answer in (*e.right, *e.wrong)]
            self.asked.append((pairs[0][0], [answer for _, answer in pairs], False))

    def attach(self, side: str, where: str) -> list[torch.nn.Parameter]:
        """Scales of every head, or offsets of the heads `where`; returns what is trained."""
        if side == "lora":
            return self.lora_parameters
        if where == "scales":
            start = random_init(self.model, len(every_head(self.model)), 0)
            start = start.view(*head_grid(self.model), -1)
            if side in OURS:
                return attach_scales(self.model, start)
            unhook(self.twin)
            return hook_scales(self.twin, start)
        start = random_init(self.model, len(self.heads[where]), 0)
        if side in OURS:
            return attach_offsets(self.model, self.heads[where], start)
        unhook(self.twin)
        return hook_offsets(self.twin, self.heads[where], start)

    def loss(self, side: str, texts: list) -> tuple[CrossEntropy, Callable]:
        """(an objective on these texts, rows -> the side's loss)."""
        objective = CrossEntropy(self.model, Ids(), texts, 2048)
        if side in OURS:
            ours = HiddenCache(objective)
            ours = GraphedObjective(ours) if side == "graphs" else ours
            return objective, lambda rows: ours.loss(ours.batch(rows))
        model = self.lora if side == "lora" else self.twin

        def theirs(rows: list[int]) -> torch.Tensor:
            batch = hf_batch([objective.texts[i] for i in rows], self.device)
            return model(**batch, use_cache=False).loss

        return objective, theirs

    def training(self, side: str, where: str, texts: list, epochs: int) -> Callable[[], float]:
        """Training on texts in batches of 8, from new edits on; one epoch of 8 texts is a step."""

        def run() -> float:
            parameters, (objective, loss) = self.attach(side, where), self.loss(side, texts)
            l1 = 1e-4 if where == "scales" else 0.0
            schedule = Schedule(1e-3, epochs, l1=l1)
            drawn = draw_epochs(objective.lengths, schedule, 0, by_length=side in OURS)
            optimizer, batches = make_optimizer(parameters, schedule), sum(drawn, [])
            for step, rows in enumerate(batches):
                found = train_step(optimizer, loss(rows), schedule, step, len(batches))
            return found["task_loss"]

        return run

    def greedy(self, side: str) -> list[list[int]]:
        """16 tokens after each of 16 prompts, offsets in the upper half."""
        self.attach(side, "upper")
        if side not in OURS:
            return hf_generate(self.twin, self.prompts, 16)
        decoding = {"graphs": GraphedDecoding(), "compiled": self.compiled}.get(side)
        with packed_weights(self.model):
            return generate_all(self.model, self.prompts, 16, (-1,), 16, "", decoding=decoding)

    def choices(self, side: str, n: int) -> list[list[float]]:
        """Scores of the answers to n questions."""
        self.attach(side, "upper")
        if side in OURS:
            with packed_weights(self.model):
                return score_answers(self.model, Ids(), self.asked[:n], 64, "")
        return [
            [hf_score(self.twin, [*map(int, q.split())], [*map(int, a.split())]) for a in answers]
            for q, answers, _ in self.asked[:n]
        ]

    def sides(self, work: str) -> dict[str, tuple[Callable[[], object], float]]:
        """side -> what is timed, and what its time is multiplied by."""
        if work == "greedy, 16 x 16 tokens":
            ours = OURS if "graphs" in self.ours else self.ours
            return {side: (lambda s=side: self.greedy(s), 1.0) for side in (*ours, "hf")}
        if work == "choices, 50 questions":
            n = {"ours": 50, "hf": ASKED_OF_HF}
            return {s: (lambda s=s: self.choices(s, n[s]), 50 / n[s]) for s in n}
        found = (*self.ours, "hf", "lora")
        if work == "selection step":
            return {s: (self.training(s, "scales", self.step, 1), 1.0) for s in found}
        where = "upper" if "upper" in work else "all"
        return {s: (self.training(s, where, self.examples, self.epochs), 1.0) for s in found}


def check(bench: Bench, tolerance: float) -> None:
    """All sides compute the same: losses, scores. AssertionError if not."""
    for where in ("scales", "upper", "all"):
        found = {}
        for side in (*bench.ours, "hf"):
            bench.attach(side, where)
            found[side] = bench.loss(side, bench.step)[1]([*range(8)]).item()
        for side in bench.ours:
            assert math.isclose(found[side], found["hf"], rel_tol=tolerance), (where, found)
    ours, theirs = (torch.tensor(bench.choices(side, 1)[0]) for side in ("ours", "hf"))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    one, other = (sum(bench.greedy(side), []) for side in ("ours", "hf"))
    same = sum(a == b for a, b in zip(one, other, strict=True))
    print(f"checked: losses and scores within {tolerance:g}; {same} of {len(one)} tokens equal")


def seconds(run: Callable[[], object], device: str) -> float:
    on_gpu = device != "cpu"
    torch.cuda.synchronize() if on_gpu else None
    start = time.perf_counter()
    run()
    torch.cuda.synchronize() if on_gpu else None
    return time.perf_counter() - start


def peak(bench: Bench, work: str, side: str) -> float:
    """MiB beyond weights and data at the peak of one run, in this process."""
    run, _ = bench.sides(work)[side]
    if bench.device != "cpu":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def kilobytes(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind))

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1024


def measure(bench: Bench, work: str, args: argparse.Namespace) -> list[dict]:
    """The records of all sides, which take turns; one more round warms up. Prints them."""
    sides = bench.sides(work)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds + 1):
        for side, (run, factor) in sides.items():
            times[side].append(seconds(run, args.device) * factor)
    records, ours = [], statistics.median(times["ours"][1:])
    for side, (_, *rounds) in times.items():
        median = statistics.median(rounds)
        record = {"work": work, "side": side, "rounds": rounds, "ratio": median / ours}
        if not args.no_peaks:
            record["mib"] = peak_of(bench, work, side, args)
        records.append(record)
        cells = "".join(f"{t:9.3f}" for t in (median, min(rounds), max(rounds)))
        mib = f"{record['mib']:9.0f}" if "mib" in record else ""
        print(f"{work:24}{side:8}{cells}{record['ratio']:9.2f}{mib}", flush=True)
    return records


def peak_of(bench: Bench, work: str, side: str, args: argparse.Namespace) -> float:
    """On the CPU in a process of its own: memory that was freed is not given back."""
    if args.device != "cpu":
        return peak(bench, work, side)
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", work, side]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg = parser.add_argument
    arg("--device", default="cpu")
    arg("--shape", default="small", choices=SHAPES)
    arg("--model", help="a folder, instead of a shape: real weights and texts")
    arg("--data", type=Path, default=Path("data/mini"), help="with --model")
    arg("--task", default="mquake", choices=("mquake", "clutrr"))
    arg("--epochs", type=int, default=5, help="of offset training")
    arg("--dtype", default="float32", choices=DTYPES)
    arg("--rounds", type=int, default=7)
    arg("--threads", type=int, default=2, help="on the CPU")
    arg("--only", nargs="*", default=[""], help="words in the names of the work to do")
    arg("--no-peaks", action="store_true", help="measure no memory")
    arg("--out", type=Path, default=Path("runs/benchmark.json"))
    arg("--peak", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    bench = Bench(args, dtype)
    if args.peak:
        return print(peak(bench, *args.peak))
    name = f"{args.threads} CPU threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.model or args.shape}, {args.dtype}, {name}, torch {torch.__version__}")
    check(bench, 1e-4 if dtype == torch.float32 else 5e-2)
    columns = ["median s", "from", "to", "ratio", *([] if args.no_peaks else ["MiB"])]
    print(f"\n{'':24}{'side':8}{''.join(f'{column:>9}' for column in columns)}")
    works = [work for work in WORKS if any(word in work for word in args.only)]
    records = [record for work in works for record in measure(bench, work, args)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(vars(args) | {"results": records}, default=str))


if __name__ == "__main__":
    main()
