"""Step 1 of LoFiT: learn a scale for every attention head under an L1 penalty, keep the largest.

python select_heads.py                     # -> runs/mini-llama/mquake/heads.json
python select_heads.py --model meta-llama/Llama-2-7b-hf --data data/real --heads 3%
"""

import argparse

from lofit import errors
from lofit.artefacts import save_heads
from lofit.heads import attach_scales, head_scores, init_scales, rank_heads
from lofit.recipes import count_heads
from lofit.session import Session, add_common_args, folds_of
from lofit.summary import head_map, save_head_map
from lofit.training import Schedule, fit


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_args(parser)
    parser.add_argument("--heads", help="how many to keep: a number, or a share like 3%%")
    parser.add_argument("--lr", type=float, help="peak learning rate of the scales")
    parser.add_argument("--l1", type=float, help="weight of the L1 penalty (lambda)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    return parser.parse_args(argv)


def select(args: argparse.Namespace, fold: int | None) -> None:
    """Learn the scales on one fold's training split; writes heads.json and the map."""
    run = Session(args, "select_heads", fold)
    k = count_heads(run.setting("heads", args.heads, run.recipe.heads), run.model.config)
    schedule = Schedule(
        lr=run.setting("lr", args.lr, run.recipe.select_lr),
        l1=run.setting("l1", args.l1, run.recipe.l1),
        epochs=run.setting("epochs", args.epochs, run.recipe.select_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    train = run.objective(run.read("train"), "train")
    print(f"learning a scale for every head on {len(train)} examples")

    parameters = attach_scales(run.model, init_scales(run.model, run.seed))
    for epoch, loss in fit(parameters, train.lengths, train.loss, schedule, run.seed, run.log):
        norm = head_scores(run.model).sum()
        print(f"epoch {epoch}/{schedule.epochs}  loss {loss:.4f}  sum of scores {norm:.2f}")

    scores = head_scores(run.model).cpu()
    heads = rank_heads(scores, k)
    save_heads(run.folder / "heads.json", heads, scores, run.info())
    print(f"\n{head_map(scores, heads)}\n\n{k} heads -> {run.folder / 'heads.json'}")
    if save_head_map(run.folder / "heads.png", scores, heads, run.title):
        print(f"the same as a picture -> {run.folder / 'heads.png'}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for fold in folds_of(args):
        select(args, fold)


if __name__ == "__main__":
    errors.run(main)
