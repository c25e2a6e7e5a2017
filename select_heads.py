"""Step 1 of LoFiT: learn a scale for every attention head under an L1 penalty, keep the largest.

python select_heads.py                     # -> runs/mini-llama/mquake/heads.json
python select_heads.py --model meta-llama/Llama-2-7b-hf --data data/real --heads 3%
python select_heads.py --by gradient       # another way to choose: see lofit/compare/selection.py
"""

import argparse

import torch
from tqdm import tqdm

from lofit import errors
from lofit.heads import attach_scales, every_head, head_grid, head_scores, random_init, rank_heads
from lofit.recipes import count_heads
from lofit.run.arguments import not_negative, refuse, training_parser
from lofit.run.files import HEADS, save_heads
from lofit.run.resume import restore, save_epoch, state_file
from lofit.run.setup import Run, make_objective, open_runs
from lofit.run.summary import head_map, save_picture
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__)
    arg = parser.add_argument
    arg("--by", default="scales", choices=("scales", "gradient", "probe", "random"),
        help="how heads are scored (default: %(default)s, LoFiT's way)")  # fmt: skip
    arg("--heads", help="how many to keep: a number, or a share like 3%% (default: the recipe's)")
    arg("--l1", type=not_negative, help="lambda, weight of the L1 penalty (default: the recipe's)")
    args = parser.parse_args(argv)
    if args.by != "scales":
        unused = ["lr", "l1", "epochs", "batch_size"]
        unused += ["accumulate"] if args.by != "gradient" else []
        refuse(parser, args, dict.fromkeys(unused, f"--by {args.by} learns nothing"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with open_runs(args, "select_heads") as runs:
        for run in runs:
            select(args, run)


def select(args: argparse.Namespace, run: Run) -> None:
    """Score every head on the training split, keep the K best; writes heads.json and the map."""
    k = count_heads(run.setting("heads", args.heads, run.recipe.heads), run.model.config)
    run.info["settings"]["by"] = args.by
    if args.by == "scales":
        scores = learn_scales(args, run)
    else:
        from lofit.compare.selection import score_heads

        scores = score_heads(args.by, run, args.n_train)
    # Only the ranking goes on to step 2. A scale can but stretch what a head says already; an
    # offset can say something new, and is learned from its own start.
    heads = rank_heads(scores, k)
    save_heads(run.folder / HEADS, heads, scores, run.info)
    picture = save_picture(run.folder / "heads.png", scores, heads, f"{run.title}, by {args.by}")
    state_file(run).unlink(missing_ok=True)
    print(f"\n{head_map(scores, heads)}\n\n{k} heads -> {run.folder / HEADS}{picture}")


def learn_scales(args: argparse.Namespace, run: Run) -> torch.Tensor:
    """Score every head by the norm of its learned scale (paper, section 3): [layer, head]."""
    recipe = run.recipe
    schedule = Schedule(
        lr=run.setting("lr", args.lr, recipe.select_lr),
        l1=run.setting("l1", args.l1, recipe.l1),
        epochs=run.setting("epochs", args.epochs, recipe.select_epochs),
        batch_size=run.setting("batch_size", args.batch_size, recipe.batch_size),
    )
    examples = run.read("train", args.n_train)
    objective = make_objective(run, examples, "train")
    # all heads start alike, near 0: what the penalty leaves of a scale is what the loss gains by it
    initial = random_init(run.model, len(every_head(run.model)), run.seed)
    parameters = attach_scales(run.model, initial.view(*head_grid(run.model), -1))
    epochs = draw_epochs(objective.lengths, schedule, run.seed, by_length=not run.plain)
    optimizer, total = make_optimizer(parameters, schedule), sum(map(len, epochs))
    # 0, or how many epochs the same command had done when it was stopped
    start, _ = restore(run, optimizer, objective, epochs[0])
    step = sum(map(len, epochs[:start]))
    print(f"learning a scale for every head on {len(examples)} examples")

    for epoch in range(start, schedule.epochs):
        losses = []
        for rows in tqdm(epochs[epoch], f"epoch {epoch + 1}", disable=None, leave=False):
            loss = objective.loss(objective.batch(rows))  # cross-entropy on the answers, or DPO
            # + lambda * sum |A|: every scale has to pay for its size
            record = train_step(optimizer, loss, schedule, step, total)
            run.log({"epoch": epoch + 1} | record)
            losses.append(record["task_loss"])
            step += 1
        mean, scores = sum(losses) / len(losses), head_scores(run.model)
        print(f"epoch {epoch + 1}/{schedule.epochs}  loss {mean:.4f}  scores {scores.sum():.2f}")
        if epoch + 1 < schedule.epochs:
            save_epoch(run, epoch + 1, optimizer)
    return head_scores(run.model)


def command() -> None:
    """As a program: errors are one line."""
    errors.run(main)


if __name__ == "__main__":
    command()
