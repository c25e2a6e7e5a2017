"""Step 1 of LoFiT: learn a scale for every attention head under an L1 penalty, keep the largest.

python select_heads.py                     # -> runs/mini-llama/mquake/heads.json
python select_heads.py --model meta-llama/Llama-2-7b-hf --data data/real --heads 3%
python select_heads.py --by gradient       # another way to choose: see lofit/compare/selection.py
"""

import argparse

import torch

from lofit.heads import attach_scales, head_scores, init_scales, rank_heads
from lofit.recipes import count_heads
from lofit.run.arguments import common_parser, int_at_least, nonnegative_float, positive_float
from lofit.run.artefacts import HEADS, PICTURE, save_heads
from lofit.run.session import Session, run_script
from lofit.run.summary import head_map, head_picture
from lofit.training import Schedule, Training, fit


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--by",
        default="scales",
        help="scales, gradient, gates, probe, random, spread, or task:OTHER, the run of another"
        " task or its folder",
    )
    parser.add_argument("--heads", help="how many to keep: a number, or a share like 3%%")
    parser.add_argument("--n-train", type=int_at_least(1), help="so many examples (default: all)")
    parser.add_argument("--lr", type=positive_float, help="peak learning rate of the scales")
    parser.add_argument("--l1", type=nonnegative_float, help="lambda, weight of the L1 penalty")
    parser.add_argument("--epochs", type=int_at_least(1))
    parser.add_argument("--batch-size", type=int_at_least(1))
    parser.add_argument(
        "--compile", action="store_const", const=True,
        help="the layers, in training (for long runs on a GPU)",
    )  # fmt: skip
    return parser.parse_args(argv)


def learn_scales(args: argparse.Namespace, run: Session) -> torch.Tensor:
    """Score every head by the norm of its learned scale (paper, section 3): [layer, head]."""
    schedule = Schedule(
        lr=run.setting("lr", args.lr, run.recipe.select_lr),
        l1=run.setting("l1", args.l1, run.recipe.l1),
        epochs=run.setting("epochs", args.epochs, run.recipe.select_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    objective = run.objective(run.read("train", args.n_train), "train")
    print(f"learning a scale for every head on {len(objective)} examples")

    parameters = attach_scales(run.model, init_scales(run.model, run.seed))
    training = Training(parameters, objective, schedule, run.seed)
    with run.recorded(training) as on_step:
        for epoch, loss in fit(training, on_step):
            total = head_scores(run.model).sum()
            print(f"epoch {epoch}/{schedule.epochs}  loss {loss:.4f}  sum of scores {total:.2f}")
    return head_scores(run.model)


def select(args: argparse.Namespace, run: Session) -> None:
    """Score the heads on one fold's training split; writes heads.json and the map."""
    k = count_heads(run.setting("heads", args.heads, run.recipe.heads), run.model.config)
    if args.by == "scales":
        scores, label = learn_scales(args, run).cpu(), "score: norm of the learned scale"
    else:
        from lofit.compare.selection import score_heads

        scores, label = score_heads(args, run).cpu(), f"score by {args.by}"
    heads = rank_heads(scores, k)
    picture = head_picture(scores, heads, run.title, label)
    save_heads(run.folder / HEADS, heads, scores, run.info(), picture)
    print(f"\n{head_map(scores, heads)}\n")
    print(f"{k} heads -> {run.folder / HEADS}{f', {PICTURE}' if picture else ''}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.by != "scales":
        from lofit.compare.selection import check_by

        check_by(args)
    run = Session(args, "select_heads")
    for _ in run.folds():
        select(args, run)


if __name__ == "__main__":
    run_script(main)
