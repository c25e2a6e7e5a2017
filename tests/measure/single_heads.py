"""Trains every head of a model alone and tests each: how much one head can do, for all of them.

python tests/measure/single_heads.py --task mquake --epochs 20 --lr 1
python tests/measure/single_heads.py --task clutrr
python tests/measure/single_heads.py --model weights/gemma-3-270m --data data/real --task mquake

One line a head goes to --out as soon as it is tested, with the items' scores in the order of the
data. What is there already is not run again. The heads are taken in turns over the layers, so that
a part of the map holds all layers. --only 0,4 trains these heads alone.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from lofit.files import read_jsonl
from lofit.heads import attach_offsets, edits_off, head_grid, init_offsets
from lofit.run.arguments import common_parser
from lofit.run.evaluation import evaluate
from lofit.run.session import Session
from lofit.studies.records import pack
from lofit.training import Schedule, Training, fit


def parse_args() -> argparse.Namespace:
    parser = common_parser(__doc__)
    arg = parser.add_argument
    arg("--out", type=Path, default=Path("docs/results/alone/mini-llama.jsonl"))
    arg("--epochs", type=int, help="default: the recipe's")
    arg("--lr", type=float, help="default: the recipe's for one head")
    arg("--only", nargs="+", default=[], metavar="LAYER,HEAD")
    args = parser.parse_args()
    args.only = [tuple(map(int, text.split(","))) for text in args.only]
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    run = Session(args, "single_heads", "-single-heads")
    next(iter(run.folds()))
    layers, per_layer = head_grid(run.model)
    schedule = Schedule(
        lr=args.lr or run.recipe.lr_of(1, layers * per_layer),
        epochs=args.epochs or run.recipe.offset_epochs,
        batch_size=run.recipe.batch_size,
    )
    about = {"model": args.model, "task": run.task_name, "data": str(run.data), "seed": run.seed}
    about |= {"dtype": run.dtype, "data_hash": run.data_hash, "epochs": schedule.epochs}
    about |= {"lr": schedule.lr, "fingerprint": run.model.source.fingerprint}
    objective, test = run.objective(run.read("train"), "train"), run.read("test")

    def test_scores() -> list[float]:
        return [found[run.task.MAIN_METRIC] for found in evaluate(run, test, 64, "test")]

    def known() -> set[tuple[int, int] | None]:
        if not args.out.exists():
            return set()
        found = [line for _, line in read_jsonl(args.out) if about.items() <= line.items()]
        return {line["head"] and tuple(line["head"]) for line in found}

    def add(head: tuple[int, int] | None, measured: dict, scores: list[float]) -> None:
        mean = sum(scores) / len(scores)
        line = about | {"head": head} | measured | {"n": len(scores), "score": round(mean, 6)}
        line["hits"] = pack(scores)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"head {head}: {mean:.1%}", flush=True)

    if None not in known():
        with edits_off(run.model):
            add(None, {}, test_scores())
    for head in args.only or [(layer, h) for h in range(per_layer) for layer in range(layers)]:
        if head in known():
            continue
        began = time.time()
        parameters = attach_offsets(run.model, [head], init_offsets(run.model, 1, run.seed))
        losses = [loss for _, loss in fit(Training(parameters, objective, schedule, run.seed))]
        trained, scores = time.time() - began, test_scores()
        seconds = {"train": round(trained, 1), "test": round(time.time() - began - trained, 1)}
        add(head, {"train_loss": round(losses[-1], 4), "seconds": seconds}, scores)


if __name__ == "__main__":
    main()
