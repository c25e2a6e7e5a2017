"""Step 2 of LoFiT: learn an offset vector for each chosen head; nothing else of the model changes.

python train.py --task mquake              # heads.json of the run -> offsets.safetensors
python train.py --heads random             # a control: as many heads, drawn by the seed
"""

import argparse
import random
from pathlib import Path

from lofit.errors import InputError
from lofit.heads import (
    Head,
    attach_offsets,
    gather_offsets,
    head_grid,
    init_offsets,
    rank_heads,
)
from lofit.llm.files import read_json
from lofit.recipes import count_heads
from lofit.run.arguments import (
    METHODS,
    common_parser,
    eval_command,
    int_at_least,
    positive_float,
    train_suffix,
)
from lofit.run.artefacts import (
    HEADS,
    OFFSETS,
    check_same_run,
    find_heads,
    hash_of_file,
    load_heads,
    save_offsets,
)
from lofit.run.evaluation import validate_epoch
from lofit.run.session import Session, run_script
from lofit.training import Schedule, Training, fit


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--heads",
        help="FILE, run folder of select_heads.py, random or all (default: this run's folder)",
    )
    parser.add_argument(
        "--top",
        help="how many heads of FILE or at random (layers of --method post_block): a number or 3%%",
    )
    parser.add_argument("--draw", type=int_at_least(0), help="which random heads (default: seed)")
    parser.add_argument("--n-train", type=int_at_least(1), help="so many examples (default: all)")
    parser.add_argument("--lr", type=positive_float, help="peak learning rate of the offsets")
    parser.add_argument("--method", choices=METHODS, default="lofit")
    parser.add_argument("--alpha", type=positive_float, help="strength of --method iti and repe")
    parser.add_argument("--epochs", type=int_at_least(1))
    parser.add_argument("--batch-size", type=int_at_least(1))
    parser.add_argument(
        "--validate", default="every", choices=("every", "last"), help="after which epochs"
    )
    parser.add_argument(
        "--compile", action="store_const", const=True,
        help="the layers, in training (for long runs on a GPU)",
    )  # fmt: skip
    return parser.parse_args(argv)


def choose_heads(args: argparse.Namespace, run: Session) -> list[Head]:
    """The heads to train: all, drawn at random by the seed, or from select_heads.py's file."""
    layers, per_layer = head_grid(run.model)
    every = [(layer, head) for layer in range(layers) for head in range(per_layer)]
    if args.heads == "all":
        return every
    if args.heads == "random":
        k = count_heads(run.setting("top", args.top, run.recipe.heads), run.model.config)
        draw = run.seed if args.draw is None else run.setting("draw", args.draw, run.seed)
        return random.Random(draw).sample(every, k)
    path = find_heads(Path(args.heads), run.fold) if args.heads else run.folder / HEADS
    if not path.exists():
        raise InputError(f"{path}: no such file; run select_heads.py first, or name a file")
    heads, scores = load_heads(path, run.model)
    if not args.heads:  # named heads may be of another task
        check_same_run(path, read_json(path), run.info(), "select_heads.py")
    return rank_heads(scores, count_heads(args.top, run.model.config)) if args.top else heads


def learn_offsets(args: argparse.Namespace, run: Session) -> None:
    """Learn the offsets on one fold's training split; writes offsets.safetensors."""
    heads = choose_heads(args, run)
    layers, per_layer = head_grid(run.model)
    schedule = Schedule(
        lr=run.setting("lr", args.lr, run.recipe.lr_of(len(heads), layers * per_layer)),
        epochs=run.setting("epochs", args.epochs, run.recipe.offset_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    run.settings["heads"] = args.heads or "heads.json"
    objective, val = run.objective(run.read("train", args.n_train), "train"), run.read("val")
    held_out = run.objective(val, "val")
    n_trained = len(heads) * run.model.config.head_dim
    print(f"learning {len(heads)} offsets ({n_trained:,} values) on {len(objective)} examples")

    parameters = attach_offsets(run.model, heads, init_offsets(run.model, len(heads), run.seed))
    training, metrics = Training(parameters, objective, schedule, run.seed), {}
    with run.recorded(training) as on_step:
        for epoch, loss in fit(training, on_step):
            line = f"epoch {epoch}/{schedule.epochs}  loss {loss:.4f}"
            if args.validate == "every" or epoch == schedule.epochs:
                metrics, scores = validate_epoch(run, epoch, loss, held_out, val)
                line += scores
            print(line)

    offsets, path = gather_offsets(run.model, heads), run.folder / OFFSETS
    made_from = {} if args.heads else {"heads_hash": hash_of_file(run.folder / HEADS)}
    save_offsets(path, heads, offsets, run.info() | made_from | {"val": metrics})
    size = f"norms {offsets.norm(dim=1).min():.2f} to {offsets.norm(dim=1).max():.2f}"
    print(f"{len(heads)} offsets ({size}) -> {path}")


def check_flags(args: argparse.Namespace) -> None:
    """InputError for a flag that the method or the choice of heads does not use."""
    trains, chooses = args.method not in ("iti", "repe"), args.method == "lofit"
    for name, applies, reason in (
        ("heads", chooses, f"--method {args.method}"),
        (
            "top",
            args.method in ("iti", "post_block") or chooses and args.heads != "all",
            "--heads all" if chooses else f"--method {args.method}",
        ),
        ("draw", chooses and args.heads == "random", "heads that are not drawn"),
        ("alpha", not trains, f"--method {args.method}"),
        ("lr", trains, f"--method {args.method}"),
        ("epochs", trains, f"--method {args.method}"),
        ("batch_size", trains, f"--method {args.method}"),
        ("compile", trains, f"--method {args.method}"),
    ):
        if getattr(args, name) is not None and not applies:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: not used with {reason}; leave it out")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args)
    train = learn_offsets
    if args.method != "lofit":
        from lofit.compare.methods import train_method as train
    run = Session(args, "train", train_suffix(args))
    for _ in run.folds():
        train(args, run)
    print(f"to evaluate it: {eval_command(args)}")


if __name__ == "__main__":
    run_script(main)
