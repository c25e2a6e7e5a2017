"""Step 1 of LoFiT: learn a scale for every attention head under an L1 penalty, keep the largest.

python select_heads.py                     # -> runs/mini-llama/mquake/heads.json
python select_heads.py --model meta-llama/Llama-2-7b-hf --data data/real --heads 3%
python select_heads.py --by gradient       # another way of choosing: see lofit/compare/selection.py
"""

import argparse

from lofit import errors
from lofit.compare.selection import WAYS, ground_of
from lofit.distributed import group as parallel
from lofit.heads import rank_heads
from lofit.recipes import count_heads
from lofit.run.arguments import common_parser, folds_of, real, real_or_0, whole
from lofit.run.artefacts import HEADS, PICTURE, load_heads, other_task, save_heads
from lofit.run.session import Session
from lofit.run.summary import head_map, head_picture


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--by",
        default="scales",
        help=f"{', '.join(WAYS)}, or task:OTHER, the run of another task or its folder",
    )
    parser.add_argument("--heads", help="how many to keep: a number, or a share like 3%%")
    parser.add_argument("--n-train", type=whole(1), help="so many examples (default: all)")
    parser.add_argument("--lr", type=real, help="peak learning rate of what is learnt")
    parser.add_argument("--l1", type=real_or_0, help="lambda, weight of the L1 penalty (gates: L0)")
    parser.add_argument("--epochs", type=whole(1))
    parser.add_argument("--batch-size", type=whole(1))
    return parser.parse_args(argv)


def select(args: argparse.Namespace, fold: int | None) -> Session:
    """Score the heads on one fold's training split; writes heads.json and the map."""
    way, _, other = args.by.partition(":")
    if way not in WAYS and not (way == "task" and other):
        raise errors.InputError(f"--by {args.by}: expected {', '.join(WAYS)}, or task:OTHER")
    run = Session(args, "select_heads", fold)
    k = count_heads(run.setting("heads", args.heads, run.recipe.heads), run.model.config)
    if args.by != "scales":
        run.settings["by"] = args.by
    if other:
        scores = load_heads(other_task(other, run.folder, run.fold), run.model)[1]
    else:
        scores = WAYS[way](ground_of(args, run)).cpu()
    heads = rank_heads(scores, k)
    label = "score: norm of the learned scale" if way == "scales" else f"score by {args.by}"
    picture = head_picture(scores, heads, run.title, label)
    save_heads(run.folder / HEADS, heads, scores, run.info(), picture)
    print(f"\n{head_map(scores, heads)}\n")
    print(f"{k} heads -> {run.folder / HEADS}{f', {PICTURE}' if picture else ''}")
    return run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for run in [select(args, fold) for fold in folds_of(args)]:
        run.finish()


if __name__ == "__main__":
    parallel.run(main)
