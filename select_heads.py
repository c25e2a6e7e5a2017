"""Step 1 of LoFiT: learn a scale for every attention head under an L1 penalty, keep the largest.

python select_heads.py                     # -> runs/mini-llama/mquake/heads.json
python select_heads.py --model meta-llama/Llama-2-7b-hf --data data/real --heads 3%
python select_heads.py --by gradient       # another way of choosing: see lofit/ways.py
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from lofit import errors
from lofit.artefacts import load_heads, save_heads
from lofit.heads import rank_heads
from lofit.recipes import count_heads
from lofit.session import Session, add_common_args, folds_of
from lofit.summary import head_map, save_head_map
from lofit.training import Schedule
from lofit.ways import TRAINED, WAYS, Ground


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_args(parser)
    parser.add_argument(
        "--by",
        default="scales",
        help=f"{', '.join(WAYS)}, or task:OTHER, the run of another task or its folder",
    )
    parser.add_argument("--heads", help="how many to keep: a number, or a share like 3%%")
    parser.add_argument("--n-train", type=int, help="learn from so many examples (default: all)")
    parser.add_argument("--lr", type=float, help="peak learning rate of what is learnt")
    parser.add_argument("--l1", type=float, help="weight of the L1 penalty (lambda), of gates L0")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    return parser.parse_args(argv)


def ground_of(args: argparse.Namespace, run: Session) -> Ground:
    """What the way looks at; reads and prints the settings that it uses."""
    recipe, by = run.recipe, args.by
    lr, penalty = TRAINED.get(by, (recipe.select_lr, recipe.l1))
    origin = f"default of --by {by}" if by in TRAINED else None
    schedule = Schedule(lr, recipe.select_epochs, recipe.batch_size, by_length=not args.plain)
    if by == "scales" or by in TRAINED:
        lr = run.setting("lr", args.lr, lr, origin)
        penalty = run.setting("l1", args.l1, penalty, origin)
        schedule = Schedule(
            lr=lr,
            l1=penalty if by == "scales" else 0.0,
            epochs=run.setting("epochs", args.epochs, recipe.select_epochs),
            batch_size=run.setting("batch_size", args.batch_size, recipe.batch_size),
            by_length=not args.plain,
        )
    examples = run.read("train", args.n_train)
    train = run.objective(examples, "train")
    what = "learning a scale for every head" if by == "scales" else f"scoring every head by {by}"
    print(f"{what} on {len(train)} examples")
    pairs = partial(run.contrast, examples)
    return Ground(run.model, train, schedule, run.seed, run.log, penalty, pairs)


def heads_of_other(other: str, run: Session) -> torch.Tensor:
    """The scores in heads.json of another task's run: a folder, or the task's name if the run lies
    beside this one. Of a run in folds the same one, or the first. InputError if there is none."""
    top = run.folder if run.fold is None else run.folder.parent
    folder = Path(other) if Path(other).is_dir() else top.parent / other
    folds = [folder / f"fold{run.fold or 0}", folder]
    path = next((p for p in (f / "heads.json" for f in folds) if p.exists()), None)
    if path is None:
        raise errors.InputError(
            f"--by task:{other}: {folder / 'heads.json'}: no such file; run select_heads.py"
            f" --task {Path(other).name} first, or name a run folder"
        )
    return load_heads(path, run.model)[1]


def select(args: argparse.Namespace, fold: int | None) -> None:
    """Score the heads on one fold's training split; writes heads.json and the map."""
    way, _, other = args.by.partition(":")
    if way not in WAYS and not (way == "task" and other):
        raise errors.InputError(f"--by {args.by}: expected {', '.join(WAYS)}, or task:OTHER")
    run = Session(args, "select_heads", fold)
    k = count_heads(run.setting("heads", args.heads, run.recipe.heads), run.model.config)
    if args.by != "scales":
        run.settings["by"] = args.by
    scores = heads_of_other(other, run) if other else WAYS[way](ground_of(args, run)).cpu()
    heads = rank_heads(scores, k)
    save_heads(run.folder / "heads.json", heads, scores, run.info())
    print(f"\n{head_map(scores, heads)}\n\n{k} heads -> {run.folder / 'heads.json'}")
    label = "score: norm of the learned scale" if way == "scales" else f"score by {args.by}"
    if save_head_map(run.folder / "heads.png", scores, heads, run.title, label):
        print(f"the same as a picture -> {run.folder / 'heads.png'}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for fold in folds_of(args):
        select(args, fold)


if __name__ == "__main__":
    errors.run(main)
