"""Train or compute another method on one fold, with LoFiT's data, loop, validation and files."""

import argparse

import torch

from lofit.compare import bias, iti, lora, post_block, red, repe
from lofit.compare.edits import attach, gather
from lofit.compare.selection import contrast, last_z, probe_accuracy
from lofit.compare.stored import KINDS, hash_of_tensors
from lofit.files import as_json, as_tensors, write_atomic
from lofit.heads import attach_offsets, rank_heads
from lofit.recipes import count_heads, count_of
from lofit.run.artefacts import ADAPTER_CONFIG, OFFSETS, save_offsets
from lofit.run.evaluation import validate, validate_epoch
from lofit.run.session import Session
from lofit.training import Schedule, Training, fit

# Peak learning rates of what is trained; strengths of what is not. The best depends on model and
# task: `python -m lofit.studies methods` tries three on validation.
START = {"lora": lora.init, "red": red.init, "bias": bias.init, "post_block": post_block.init}
LR = {"lora": 5e-4, "red": 5e-3, "bias": 5e-3, "post_block": 2e-2}
ALPHA = {"iti": 15.0, "repe": 1.0}


def train_method(args: argparse.Namespace, run: Session) -> None:
    """Write the method's offsets.safetensors (and peft's files for LoRA) to the run folder."""
    run.settings["method"] = args.method
    if args.method in LR:
        train_edits(args, run)
    elif args.method == "repe":
        compute_repe(args, run)
    else:
        compute_iti(args, run)


def train_edits(args: argparse.Namespace, run: Session) -> None:
    """What is trained: as many epochs and the same batches as LoFiT's second step."""
    schedule = Schedule(
        lr=run.setting("lr", args.lr, LR[args.method], f"{args.method}'s"),
        epochs=run.setting("epochs", args.epochs, run.recipe.offset_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    objective, val = run.objective(run.read("train", args.n_train), "train"), run.read("val")
    held_out = run.objective(val, "val")
    parameters = attach(run.model, KINDS[args.method], _start(args, run))
    n_trained = sum(p.numel() for p in parameters)
    print(f"learning {n_trained:,} values by {args.method} on {len(objective)} examples")
    training, metrics = Training(parameters, objective, schedule, run.seed), {}
    with run.recorded(training) as on_step:
        for epoch, loss in fit(training, on_step):
            line = f"epoch {epoch}/{schedule.epochs}  loss {loss:.4f}"
            if args.validate == "every" or epoch == schedule.epochs:
                metrics, scores = validate_epoch(run, epoch, loss, held_out, val)
                line += scores
            print(line)
    save_edits(args, run, metrics)


def _start(args: argparse.Namespace, run: Session) -> dict[str, torch.Tensor]:
    """The untrained tensors; of post_block for --top of the layers, if it is given."""
    config, n = run.model.config, run.model.config.num_hidden_layers
    if not args.top:
        return START[args.method](config, run.seed)
    run.settings["layers"] = post_block.spread(n, count_of(args.top, n, "layers"))
    return post_block.init(config, run.seed, run.settings["layers"])


@torch.no_grad()
def compute_repe(args: argparse.Namespace, run: Session) -> None:
    """RepE: reading vectors of right and wrong answers to the training questions."""
    alpha, texts = _alpha(args, run), contrast(run, run.read("train", args.n_train))
    shift = repe.reading_vectors(repe.last_hidden(run.model, texts), alpha)
    layers = repe.middle(run.model.config.num_hidden_layers)
    attach(run.model, post_block.PostBlock, {f"layers.{i}.shift": shift[i] for i in layers})
    save_edits(args, run, validate(run, run.read("val")))


def compute_iti(args: argparse.Namespace, run: Session) -> None:
    """ITI: shifts of the heads whose probes tell right answers from wrong ones best."""
    alpha = _alpha(args, run)
    k = count_heads(run.setting("top", args.top, run.recipe.heads), run.model.config)
    z = last_z(run.model, contrast(run, run.read("train", args.n_train)))
    heads = rank_heads(probe_accuracy(z, run.seed), k)
    offsets = iti.mass_mean_shift(z, heads, alpha)
    attach_offsets(run.model, heads, offsets)
    path, val = run.folder / OFFSETS, validate(run, run.read("val"))
    save_offsets(path, heads, offsets, run.info() | {"val": val})
    print(f"{k} offsets -> {path}")


def _alpha(args: argparse.Namespace, run: Session) -> float:
    return run.setting("alpha", args.alpha, ALPHA[args.method], f"{args.method}'s")


def save_edits(args: argparse.Namespace, run: Session, val: dict) -> None:
    """Write the attached edits with their metadata."""
    tensors, path = gather(run.model), run.folder / OFFSETS
    n = sum(tensor.numel() for tensor in tensors.values())
    info = run.info() | {"val": val, "method": args.method, "trained_values": n}
    info |= {"share_of_base": n / run.n_base, "offsets_hash": hash_of_tensors(tensors)}
    beside = {ADAPTER_CONFIG: as_json(info)}
    if args.method == "lora":
        beside |= lora.as_peft(tensors, run.model.source.name)
    beside = {run.folder / name: write for name, write in beside.items()}
    write_atomic(path, as_tensors(tensors, info), beside)
    print(f"{n:,} values of {args.method} -> {path}")
