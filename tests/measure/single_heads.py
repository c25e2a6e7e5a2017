"""Trains every head of a model alone and tests each: how much one head can do, for all of them.

python tests/measure/single_heads.py --task mquake --epochs 20 --lr 1
python tests/measure/single_heads.py --model weights/gemma-3-270m --data data/real --task mquake

One line a head goes to docs/results/alone/MODEL.jsonl as soon as it is tested, with the items'
scores in the order of the data. What is there already is not run again. The heads are taken in
turns over the layers, so that a part of the map holds all layers.
"""

import json
from pathlib import Path

from lofit import errors
from lofit.evaluation import evaluate
from lofit.files import read_jsonl
from lofit.heads import attach_offsets, head_grid, random_init, remove_edits
from lofit.run.arguments import training_parser
from lofit.run.setup import make_objective, open_runs
from lofit.studies.records import pack
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step

ALONE = Path("docs/results/alone")


def main(argv: list[str] | None = None) -> None:
    args = training_parser(__doc__).parse_args(argv)
    with open_runs(args, "single_heads", "-single-heads") as runs:
        for run in runs:
            every_head_alone(args, run)


def every_head_alone(args, run) -> None:
    layers, per_layer = head_grid(run.model)
    schedule = Schedule(
        lr=args.lr or run.recipe.lr_of(1, layers * per_layer),
        epochs=args.epochs or run.recipe.offset_epochs,
        batch_size=args.batch_size or run.recipe.batch_size,
    )
    about = {key: run.info[key] for key in ("model", "task", "seed", "data_hash")}
    about |= {"dtype": run.info["settings"]["dtype"], "epochs": schedule.epochs, "lr": schedule.lr}
    out, test = ALONE / f"{Path(args.model).name}.jsonl", run.read("test")
    objective = make_objective(run, run.read("train", args.n_train), "train")
    known = [line for _, line in read_jsonl(out)] if out.exists() else []
    done = {str(line["head"]) for line in known if about.items() <= line.items()}
    for head in [None, *((layer, h) for h in range(per_layer) for layer in range(layers))]:
        if str(head and list(head)) in done:
            continue
        if head:
            parameters = attach_offsets(run.model, [head], random_init(run.model, 1, run.seed))
            epochs = draw_epochs(objective.lengths, schedule, run.seed, by_length=True)
            optimizer, steps = make_optimizer(parameters, schedule), sum(epochs, [])
            for step, rows in enumerate(steps):
                loss = objective.loss(objective.batch(rows))
                train_step(optimizer, loss, schedule, step, len(steps))
        else:  # the base model
            remove_edits(run.model)
        scores = [found[run.task.metrics[0]] for found in evaluate(run, test, 64, "test")]
        measured = {"n": len(scores), "score": round(sum(scores) / len(scores), 6)}
        line = about | {"head": head} | measured | {"hits": pack(scores)}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"head {head}: {measured['score']:.1%}", flush=True)


if __name__ == "__main__":
    errors.run(main)
