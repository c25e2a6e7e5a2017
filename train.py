"""Step 2 of LoFiT: learn an offset vector for each chosen head; nothing else of the model changes.

python train.py --task mquake              # heads.json of the run -> offsets.safetensors
python train.py --heads random             # a control: as many heads, drawn by the seed
"""

import argparse
import random
from pathlib import Path

from lofit import errors
from lofit.compare import methods as baselines
from lofit.distributed import group as parallel
from lofit.heads import (
    SIGMA_TEXTS,
    Head,
    attach_offsets,
    gather_offsets,
    head_sigma,
    init_offsets,
    rank_heads,
)
from lofit.recipes import count_heads
from lofit.run.arguments import common_parser, folds_of, real, whole
from lofit.run.artefacts import HEADS, OFFSETS, find_heads, load_heads, save_offsets
from lofit.run.session import Session
from lofit.training import Schedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--heads",
        help="FILE, run folder of select_heads.py, random or all (default: this run's folder)",
    )
    parser.add_argument("--top", help="how many heads of FILE or at random: a number or 3%%")
    parser.add_argument("--draw", type=whole(0), help="which random heads (default: the seed)")
    parser.add_argument("--n-train", type=whole(1), help="train on so many examples (default: all)")
    parser.add_argument("--lr", type=real, help="peak learning rate of the offsets")
    parser.add_argument(
        "--unit",
        choices=("one", "sigma"),
        help="what offsets and lr are measured in: see head_sigma",
    )
    parser.add_argument("--method", choices=baselines.METHODS, default="lofit")
    parser.add_argument("--alpha", type=real, help="strength of --method iti and repe")
    parser.add_argument("--epochs", type=whole(1))
    parser.add_argument("--batch-size", type=whole(1))
    parser.add_argument(
        "--validate", default="every", choices=("every", "last"), help="after which epochs"
    )
    return parser.parse_args(argv)


def choose_heads(args: argparse.Namespace, run: Session) -> list[Head]:
    """The heads to train: all, drawn at random by the seed, or from select_heads.py's file."""
    config = run.model.config
    every = [
        (layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    ]
    if args.heads == "all":
        return every
    if args.heads == "random":
        k = count_heads(run.setting("top", args.top, run.recipe.heads), config)
        draw = run.seed if args.draw is None else run.setting("draw", args.draw, run.seed)
        return random.Random(draw).sample(every, k)
    path = find_heads(Path(args.heads), run.fold) if args.heads else run.folder / HEADS
    if not path.exists():
        raise errors.InputError(f"{path}: no such file; run select_heads.py first, or name a file")
    heads, scores = load_heads(path, run.model)
    return rank_heads(scores, count_heads(args.top, config)) if args.top else heads


def train_fold(args: argparse.Namespace, fold: int | None) -> Session:
    """Learn the offsets on one fold's training split; writes offsets.safetensors."""
    control = args.heads in ("random", "all")
    run = Session(args, "train", fold, run_suffix=f"-{args.heads}" if control else "")
    heads = choose_heads(args, run)
    config = run.model.config
    lr = run.recipe.lr_of(len(heads), config.num_hidden_layers * config.num_attention_heads)
    schedule = Schedule(
        lr=run.setting("lr", args.lr, lr),
        epochs=run.setting("epochs", args.epochs, run.recipe.offset_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    unit = run.setting("unit", args.unit, run.recipe.unit)
    run.settings["heads"] = args.heads or "heads.json"
    train = run.objective(run.read("train", args.n_train), "train")
    n_trained = len(heads) * run.model.config.head_dim
    print(f"learning {len(heads)} offsets ({n_trained:,} values) on {len(train)} examples")

    units = None
    if unit == "sigma":
        units = head_sigma(run.model, train.texts()[:SIGMA_TEXTS])[tuple(zip(*heads, strict=True))]
    init = init_offsets(run.model, len(heads), run.seed)
    parameters = attach_offsets(run.model, heads, init, units)
    metrics = run.fit(parameters, train, run.read("val"), schedule, args.validate)
    path = run.folder / OFFSETS
    offsets = gather_offsets(run.model, heads)
    save_offsets(path, heads, offsets, run.info() | {"val": metrics})
    size = f"norms {offsets.norm(dim=1).min():.2f} to {offsets.norm(dim=1).max():.2f}"
    print(f"{len(heads)} offsets ({size}) -> {path}")
    return run


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    train = train_fold if args.method == "lofit" else baselines.train_fold
    for run in [train(args, fold) for fold in folds_of(args)]:
        run.finish()


if __name__ == "__main__":
    parallel.run(main)
