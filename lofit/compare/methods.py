"""Train or compute a baseline on one fold, with LoFiT's data, loop, validation and files."""

import argparse

import torch

from lofit.compare import bias, iti, lora, red, repe
from lofit.compare.edits import attach, gather
from lofit.compare.selection import last_z, probe_accuracy
from lofit.compare.stored import KINDS, hash_of
from lofit.files import as_json, as_tensors, write_atomic
from lofit.heads import attach_offsets, rank_heads
from lofit.recipes import count_heads
from lofit.run.artefacts import ADAPTER_CONFIG, OFFSETS, save_offsets
from lofit.run.session import Session
from lofit.training import Schedule

# Peak learning rates of what is trained; strengths of what is not. To be tried on validation:
# `python -m lofit.studies methods` does.
LR = {"lora": (lora.init, 5e-4), "red": (red.init, 5e-3), "bias": (bias.init, 5e-3)}
ALPHA = {"iti": 15.0, "repe": 1.0}
METHODS = ("lofit", *LR, *ALPHA)


def train_fold(args: argparse.Namespace, fold: int | None) -> Session:
    """Write the method's offsets.safetensors (and peft's files for LoRA) to the run folder."""
    run = Session(args, "train", fold, run_suffix=f"-{args.method}")
    run.settings["method"] = args.method
    (trained if args.method in LR else computed)(args, run)
    return run


def trained(args: argparse.Namespace, run: Session) -> None:
    """LoRA, RED, bias: as many epochs and the same batches as LoFiT's second step."""
    start, lr = LR[args.method]
    schedule = Schedule(
        lr=run.setting("lr", args.lr, lr, f"{args.method}'s"),
        epochs=run.setting("epochs", args.epochs, run.recipe.offset_epochs),
        batch_size=run.setting("batch_size", args.batch_size, run.recipe.batch_size),
        by_length=not args.plain,
    )
    train = run.objective(run.read("train", args.n_train), "train")
    parameters = attach(run.model, KINDS[args.method], start(run.model.config, run.seed))
    n_trained = sum(p.numel() for p in parameters)
    print(f"learning {n_trained:,} values by {args.method} on {len(train)} examples")
    val = run.fit(parameters, train, run.read("val"), schedule, args.validate)
    write(args, run, val)


@torch.no_grad()
def computed(args: argparse.Namespace, run: Session) -> None:
    """ITI and RepE: read off right and wrong answers to the training questions."""
    alpha = run.setting("alpha", args.alpha, ALPHA[args.method], f"{args.method}'s")
    model, pairs = run.model, run.contrast(run.read("train", args.n_train))
    texts = [text for pair in pairs for text in pair]
    if args.method == "repe":
        shift = repe.reading_vectors(repe.last_hidden(model, texts), alpha)
        layers = repe.middle(model.config.num_hidden_layers)
        attach(model, repe.RepE, {f"layers.{i}.shift": shift[i] for i in layers})
        write(args, run, run.validate())
        return
    k = count_heads(run.setting("top", args.top, run.recipe.heads), model.config)
    with torch.enable_grad():  # the probes are trained
        heads = rank_heads(probe_accuracy(model, pairs, run.seed), k)
    offsets = iti.mass_mean_shift(last_z(model, texts), heads, alpha)
    attach_offsets(model, heads, offsets)
    path = run.folder / OFFSETS
    save_offsets(path, heads, offsets, run.info() | {"val": run.validate()})
    print(f"{k} offsets -> {path}")


def write(args: argparse.Namespace, run: Session, val: dict) -> None:
    """The attached edits and what is told of them."""
    tensors, path = gather(run.model), run.folder / OFFSETS
    n = sum(tensor.numel() for tensor in tensors.values())
    info = run.info() | {"val": val, "method": args.method, "trained_values": n}
    info |= {"share_of_base": n / run.n_base, "offsets_hash": hash_of(tensors)}
    beside = {ADAPTER_CONFIG: as_json(info)}
    if args.method == "lora":
        beside |= lora.as_peft(tensors, run.model.source.name)
    beside = {run.folder / name: write for name, write in beside.items()}
    write_atomic(path, as_tensors(tensors, info), beside)
    print(f"{n:,} values of {args.method} -> {path}")
