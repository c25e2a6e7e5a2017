"""How cost grows: CPU seconds and memory of each piece of work as one thing doubles.

python tests/measure/scaling.py                      # all
python tests/measure/scaling.py --only length K

A random model, one thread. Each point runs in a process of its own: once to warm up, then twice,
of which the faster stands; memory is the peak beyond the model, freed memory given back at once.
"x" is the ratio to the line above; where work grows with the thing itself that is 2.0.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for conftest
from conftest import random_model
from loading import memory
from parallel import GIVE_BACK, config_of, restart_peak
from shapes import Ids, text

from lofit.heads import attach_offsets, attach_scales, init_offsets, init_scales
from lofit.llm.generate import generate_all
from lofit.llm.scoring import score_answers
from lofit.objectives import CrossEntropy
from lofit.training import Schedule, Training, fit

BASE = {"depth": 8, "length": 64, "examples": 32, "K": 8, "answers": 4}
DOUBLED = {
    "depth": (4, 8, 16, 32),
    "length": (64, 128, 256),
    "examples": (16, 32, 64, 128),
    "K": (4, 8, 16, 32),
    "answers": (2, 4, 8, 16),
}
WORK = {  # and what it does not depend on
    "selection": ("K", "answers"),
    "training": ("answers",),
    "greedy": ("K", "answers"),
    "choices": ("K",),
}
HIDDEN = 256
N_NEW = 8  # tokens of an answer
BATCH = 8


def work_of(name: str, depth: int, length: int, examples: int, k: int, answers: int):
    """What does a piece of work once."""
    model, rng = random_model(config_of(HIDDEN, depth)).requires_grad_(False), random.Random(0)
    asked = [(text(rng, length - N_NEW), text(rng, N_NEW)) for _ in range(examples)]
    if name == "greedy":
        prompts = [[*map(int, prompt.split())] for prompt, _ in asked]
        return lambda: generate_all(model, prompts, N_NEW, (), BATCH, "")
    if name == "choices":
        choices = [(prompt, [text(rng, N_NEW) for _ in range(answers)]) for prompt, _ in asked]
        return lambda: score_answers(model, Ids(), choices, BATCH, "")
    if name == "selection":
        parameters, epochs = attach_scales(model, init_scales(model, 0)), 1
    else:  # the same heads in a model of any depth would be below or above most of it: spread
        n = model.config.num_attention_heads
        heads = [(i * depth // k, i % n) for i in range(k)]
        parameters, epochs = attach_offsets(model, heads, init_offsets(model, k, 0)), 2

    def train() -> None:
        objective = CrossEntropy(model, Ids(), asked, "")
        schedule = Schedule(lr=1e-3, l1=0.0, epochs=epochs, batch_size=BATCH)
        list(fit(Training(parameters, objective, schedule, 0)))

    return train


def one(name: str, sizes: str) -> None:
    """One process: prints CPU seconds and the peak in bytes."""
    torch.set_num_threads(1)
    depth, length, examples, k, answers = json.loads(sizes)
    work = work_of(name, depth, length, examples, k, answers)
    work()
    before, seconds = restart_peak(), []
    for _ in range(2):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    print(json.dumps([min(seconds), memory("VmHWM") - before]))


def point(name: str, sizes: dict[str, int]) -> list[float]:
    command = [sys.executable, __file__, "one", name, json.dumps(list(sizes.values()))]
    env = os.environ | GIVE_BACK | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, check=True, env=env, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    if argv[:1] == ["one"]:
        return one(*argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(DOUBLED), default=list(DOUBLED))
    for thing in parser.parse_args(argv).only:
        names = [name for name, free in WORK.items() if thing not in free]
        print(f"\n| {thing} | " + " | ".join(f"{n}, s | x | MB | x" for n in names) + " |")
        print("|---" * (1 + 4 * len(names)) + "|")
        before: dict[str, list[float]] = {}
        for size in DOUBLED[thing]:
            cells = []
            for name in names:
                found = point(name, BASE | {thing: size})
                old = before.get(name)
                ratios = [
                    f"{x / y:.1f}" if old else "" for x, y in zip(found, old or found, strict=True)
                ]
                cells += [f"{found[0]:.2f}", ratios[0], f"{found[1] / 1e6:.1f}", ratios[1]]
                before[name] = found
            print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
