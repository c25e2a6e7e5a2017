"""Step 2 of LoFiT: learn an offset vector for each chosen head; nothing else of the model changes.

python train.py --task mquake              # heads.json of the run -> offsets.safetensors
python train.py --heads random             # a control: as many heads, drawn by the seed
python train.py --method lora              # a baseline: see lofit/compare/baselines.py
"""

import argparse
import random
import shlex
from pathlib import Path

from torch import nn
from tqdm import tqdm

from lofit import errors
from lofit.errors import InputError
from lofit.evaluation import check_prompts, validate, warn_of_answers
from lofit.files import hash_of
from lofit.heads import Head, attach_offsets, every_head, random_init, rank_heads
from lofit.objectives import Objective
from lofit.recipes import count_heads
from lofit.run.arguments import METHODS, positive, refuse, shared_flags, training_parser
from lofit.run.files import (
    HEADS,
    OFFSETS,
    check_folds,
    check_made_for,
    load_heads,
    save_edits,
    warn_of_settings,
)
from lofit.run.resume import restore, save_epoch, state_file
from lofit.run.setup import Run, make_objective, open_runs
from lofit.tasks import Example
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__)
    arg = parser.add_argument
    arg("--heads", help="which heads: another run's folder, a JSON file, random, or all"
        " (default: those of this run's heads.json)")  # fmt: skip
    arg("--top", help="how many of these heads, or at random, or of a baseline's layers: a number"
        " or a share like 3%% (default: all of these; at random as many as this run's heads.json"
        " has, or the recipe's; all layers)")  # fmt: skip
    arg("--method", choices=METHODS, default="lofit", help="LoFiT, or a baseline"
        " (default: %(default)s)")  # fmt: skip
    arg("--strength", type=positive, help="of the vectors of iti and repe, which learn nothing")
    arg("--keep", choices=("last", "best"), default="last", help="the last epoch, as the paper, or"
        " the best on validation (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    unused = {}
    if args.method != "lofit":
        unused["heads"] = f"--method {args.method} does not take heads"
    if args.method in ("iti", "repe"):
        learning = ("lr", "epochs", "batch_size", "accumulate", "keep")
        unused |= dict.fromkeys(learning, f"--method {args.method} learns nothing")
    else:
        unused["strength"] = "only of --method iti and repe"
    if args.heads == "all" or args.method == "repe":
        unused["top"] = "there is nothing to choose from"
    refuse(parser, args, unused)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # a control or a baseline has a folder of its own, and never replaces the run
    control = args.heads if args.heads in ("random", "all") else ""
    variant = control if args.method == "lofit" else args.method
    with open_runs(args, "train", f"-{variant}" if variant else "") as runs:
        for run in runs:
            if variant and (run.folder / HEADS).exists():  # --run names the folder of another run
                raise InputError(
                    f"{run.folder}: {HEADS} is here, so this is the folder of LoFiT's run; give"
                    f" {variant} one of its own by --run"
                )
            train(args, run)
            words = ["python", "eval.py", *shared_flags(args, run.task.name)]
            words += ["--run", str(run.folder)] if variant or args.run else []
            print(f"to evaluate it: {shlex.join(words)}")


def train(args: argparse.Namespace, run: Run) -> None:
    """One training, of LoFiT or of a baseline: read, attach, learn, save."""
    examples, val = run.read("train", args.n_train), run.read("val")
    # a stopped run goes on only with the file that has judged its epochs so far
    run.info["val_hash"] = hash_of(run.task.file(run.data, "val"))
    # every text is read and checked before anything is trained
    objective, held_out = make_objective(run, examples, "train"), make_objective(run, val, "val")
    warn_of_answers(run, [*examples, *val])
    check_prompts(run, val)
    if run.task.file(run.data, "test").exists():  # asked when the training is done
        check_prompts(run, run.read("test"))

    parameters, lr, origin = attach(args, run, examples)
    if parameters:
        schedule = Schedule(
            lr=run.setting("lr", args.lr, lr, origin),
            epochs=run.setting("epochs", args.epochs, run.recipe.offset_epochs),
            batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        )
        run.info["settings"]["keep"] = args.keep
        n = sum(parameter.numel() for parameter in parameters)
        print(f"learning {n:,} values on {len(examples)} examples")
        metrics = learn(run, parameters, objective, schedule, val, held_out)
    else:  # iti and repe read their vectors off the model
        metrics = validate(run, val, held_out)

    save_edits(run.folder / OFFSETS, run.model, run.info | {"val": metrics})
    state_file(run).unlink(missing_ok=True)
    print(f"-> {run.folder / OFFSETS}")


def attach(
    args: argparse.Namespace, run: Run, examples: list[Example]
) -> tuple[list[nn.Parameter], float, str]:
    """Put the method's edits into the model; returns what is to be learned, and a learning rate
    with its origin."""
    if args.method != "lofit":
        from lofit.compare.baselines import attach_method

        return attach_method(run, args.method, examples, args.strength, args.top)
    heads = choose_heads(run, args.heads, args.top)
    run.info["heads"] = heads
    if not args.heads:
        run.info["heads_hash"] = hash_of(run.folder / HEADS)
    # Row i of the start belongs to the i-th head as they are ranked. These few vectors are all that
    # has gradients: the model was frozen when it was loaded.
    parameters = attach_offsets(run.model, heads, random_init(run.model, len(heads), run.seed))
    return parameters, run.recipe.lr_of(len(heads), len(every_head(run.model))), run.origin


def choose_heads(run: Run, which: str | None, top: str | None) -> list[Head]:
    """The heads to train: all, drawn at random by the seed, or those of a file."""
    every, config = every_head(run.model), run.model.config
    if which == "all":
        return every
    # The control: a choice by scores that does no better than a draw has found nothing.
    if which == "random":
        # As many as the run has that it is the control of, whose name is the same up to "-random";
        # of a task in folds it may be the folder above.
        own, default, origin = run.folder.absolute(), run.recipe.heads, ""
        above = own.parent.parent / own.parent.name.removesuffix("-random")
        for folder in (above / own.name, own.with_name(own.name.removesuffix("-random"))):
            if (folder / HEADS).exists():
                default = str(len(load_heads(folder / HEADS, run.model)[0]))
                origin = f"as many as {HEADS} has"
        k = count_heads(run.setting("top", top, default, origin), config)
        return random.Random(run.seed).sample(every, k)
    path = Path(which) if which else run.folder
    path = path / HEADS if path.is_dir() else path
    heads, scores, found = load_heads(path, run.model)
    if found or not which:
        # heads that were named may have been chosen on another task: does the choice carry over?
        keys = ("fingerprint",) if which else ("fingerprint", "data_hash", "chat")
        check_made_for(path, found, run.info, "select_heads.py", keys)
        check_folds(path, found, run.info)
    if found and not which:
        warn_of_settings(path, found, run.info, "chosen", "trained", "dtype", "quantize", "n_train")
    if top and scores is None:
        raise InputError(f"--top: {path} has no scores to rank heads by; list the heads you want")
    return rank_heads(scores, count_heads(top, config)) if top else heads


def learn(
    run: Run, parameters: list[nn.Parameter], objective: Objective, schedule: Schedule,
    val: list[Example], held_out: Objective,
) -> dict[str, float]:  # fmt: skip
    """Train the parameters of the attached edits; returns the validation of what is kept."""
    epochs = draw_epochs(objective.lengths, schedule, run.seed, by_length=not run.plain)
    optimizer, total = make_optimizer(parameters, schedule), sum(map(len, epochs))
    # 0, or how many epochs the same command had done when it was stopped
    start, best = restore(run, optimizer, objective, epochs[0])
    step, metric = sum(map(len, epochs[:start])), run.task.metrics[0]

    for epoch in range(start, schedule.epochs):
        losses = []
        for rows in tqdm(epochs[epoch], f"epoch {epoch + 1}", disable=None, leave=False):
            loss = objective.loss(objective.batch(rows))  # cross-entropy on the answers, or DPO
            record = train_step(optimizer, loss, schedule, step, total)
            run.log({"epoch": epoch + 1} | record)
            losses.append(record["task_loss"])
            step += 1
        # the training loss shows whether something is learned, these whether it carries over
        mean, metrics = sum(losses) / len(losses), validate(run, val, held_out)
        run.log({"epoch": epoch + 1, "train_loss": mean, "val": metrics})
        print(
            f"epoch {epoch + 1}/{schedule.epochs}  loss {mean:.4f}  val loss"
            f" {metrics['loss']:.4f}  val {metric} {metrics[metric]:.1%}"
        )
        if best is None or metrics[metric] > best["metrics"][metric]:
            values = [parameter.detach().clone() for parameter in parameters]
            best = {"epoch": epoch + 1, "metrics": metrics, "values": values}
        if epoch + 1 < schedule.epochs:  # after the last one the offsets themselves are written
            save_epoch(run, epoch + 1, optimizer, best)

    # The paper keeps the last epoch. A validation split of a hundred items hardly tells epochs
    # apart, and a score that was chosen by is no longer a fair one.
    keep = run.info["settings"]["keep"]
    kept = schedule.epochs if keep == "last" else best["epoch"]
    score = best["metrics"][metric]
    print(f"epoch {best['epoch']} was the best on validation ({score:.1%}); kept: epoch {kept}")
    if keep == "last":
        return metrics
    for parameter, value in zip(parameters, best["values"], strict=True):
        parameter.data.copy_(value)
    return best["metrics"]


def command() -> None:
    """As a program: errors are one line."""
    errors.run(main)


if __name__ == "__main__":
    command()
