"""Times training in float32 and in bfloat16, in turns: what `--dtype auto` chooses by.

python tests/measure/dtype.py --model weights/mini-llama
python tests/measure/dtype.py --model weights/smollm2-135m-instruct --data data/real

Seconds of processor time on one thread, forward and backward through all layers of 16 examples, the
least of the rounds.
"""

import argparse
import time
from pathlib import Path

import torch

from lofit import load_model, load_tokenizer
from lofit.heads import attach_offsets
from lofit.objectives import CrossEntropy
from lofit.run.arguments import TASKS

KINDS = (torch.float32, torch.bfloat16)


def measure(name: str, data: Path, task: str, rounds: int) -> tuple[float, float]:
    """Least seconds in each dtype."""
    tokenizer = load_tokenizer(name)
    texts = [(e.prompt, e.answer) for e in TASKS[task].read(data, "train")[:16]]
    objectives = []
    for dtype in KINDS:
        model = load_model(name, dtype=dtype)
        attach_offsets(model, [(0, 0)], torch.zeros(1, model.config.head_dim))
        objectives.append(CrossEntropy(model, tokenizer, texts, "train"))
    rows = sorted(range(16), key=objectives[0].lengths.__getitem__)
    seconds = [[], []]
    for _ in range(rounds + 1):
        for objective, times in zip(objectives, seconds, strict=True):
            start = time.process_time()
            for batch in (rows[:8], rows[8:]):
                objective.loss(batch).backward()
            times.append(time.process_time() - start)
    return tuple(min(times[1:]) for times in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="weights/mini-llama")
    parser.add_argument("--data", type=Path, default=Path("data/mini"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in ("mquake", "clutrr"):
        fp32, bf16 = measure(args.model, args.data, task, args.rounds)
        print(
            f"{Path(args.model).name:22} {task:8} float32 {fp32:6.2f} s  bfloat16 {bf16:6.2f} s"
            f"  ratio {fp32 / bf16:.2f}"
        )


if __name__ == "__main__":
    main()
