"""Base model and tuned model side by side on a split.

python eval.py                             # offsets of the run -> results.json, predictions.jsonl
python eval.py --offsets runs/mini-llama/clutrr owner/adapter     # these, beside one another
python eval.py --split val --base-only
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from lofit.errors import InputError
from lofit.files import write_json
from lofit.heads import Head, attached_heads, edits_off, gather_offsets
from lofit.llm.generate import compiled_step
from lofit.run import artefacts
from lofit.run.adapters import find_offsets
from lofit.run.arguments import common_parser, int_at_least, trained_folders
from lofit.run.artefacts import OFFSETS
from lofit.run.evaluation import evaluate
from lofit.run.session import Session, run_script
from lofit.run.summary import (
    by_answer,
    by_group,
    print_details,
    print_results,
    results_table,
    summarize,
)

# copied from the adapter's metadata; the last four only exist for methods without heads
METADATA = ("seed", "settings", "method", "trained_values", "share_of_base", "offsets_hash")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base-only", action="store_true", help="no offsets, the base model alone")
    which.add_argument(
        "--offsets", nargs="+", metavar="ADAPTER", default=[],
        help="run folders, adapter folders or hub ids, of any task (default: the run's own)",
    )  # fmt: skip
    parser.add_argument(
        "--base-from", type=Path, metavar="RUN",
        help="a run whose results hold the base model's answers to the same split",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int_at_least(1), default=64)
    parser.add_argument(
        "--max-new-tokens", type=int_at_least(1),
        help="of a generated answer (default: the task's; of own data enough for every reference)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="the decoding step (for GPUs)")
    return parser.parse_args(argv)


def find_adapters(args: argparse.Namespace, run: Session) -> dict[str, Path | None]:
    """Label -> file of offsets, each attached once to see that it fits; None for offsets that came
    with the model. InputError if there are none, or if they were trained for other questions."""
    if args.base_only:
        return {}
    own = run.folder / OFFSETS
    if not args.offsets and not own.exists():
        if attached_heads(run.model):
            return {"tuned": None}
        raise InputError(f"{own}: no such file; run train.py first, or use --base-only")
    named = args.offsets or [str(own)]
    files = {name: find_offsets(name, run.fold) for name in named}
    mine = run.info()
    for path in files.values():
        trained = artefacts.load_offsets(path, run.model)[1]
        warn_of_dtype(path, trained, run)
        if not args.offsets:
            artefacts.check_same_run(path, trained, mine, "train.py")
            artefacts.check_heads_of(path, trained)
        elif trained.get("task") == mine["task"] and trained.get("fold") != mine["fold"]:
            raise InputError(
                f"{path}: trained with fold {trained.get('fold')}, asked for fold {mine['fold']}"
            )
    return files if len(files) > 1 else {"tuned": files[named[0]]}


def warn_of_dtype(path: Path, trained: dict, run: Session) -> None:
    """Say where offsets are evaluated on a base of another dtype than they were trained on."""
    settings = trained.get("settings")
    dtype = settings.get("dtype") if isinstance(settings, dict) else None
    if dtype not in (None, run.dtype):
        print(
            f"warning: {path}: trained on a {dtype} model, evaluated on a {run.dtype} one;"
            f" --dtype {dtype} evaluates as in training",
            file=sys.stderr,
        )


def choose_run(args: argparse.Namespace) -> Path | None:
    """The run folder to evaluate: --run, or of several of this model and task the one that was
    trained last. None: the folder that the arguments name."""
    if args.run or args.offsets or args.base_only:
        return args.run
    folders = trained_folders(args)
    if len(folders) > 1:
        others = ", ".join(map(str, folders[1:]))
        print(f"evaluating {folders[0]}, trained last; --run chooses another: {others}")
    return folders[0] if folders else None


def attach(run: Session, path: Path | None) -> dict:
    """Attach a file's offsets, or keep the model's own; returns their metadata."""
    heads, trained = attached_heads(run.model), {}
    if path is not None:
        heads, trained = artefacts.load_offsets(path, run.model)
    metadata = describe(run, heads) | {"offsets": path and str(path)}
    if heads:
        offsets = gather_offsets(run.model, heads)
        metadata["offsets_hash"] = artefacts.hash_of_offsets(heads, offsets)
    return metadata | {key: trained[key] for key in METADATA if key in trained}


def describe(run: Session, heads: list[Head]) -> dict:
    """Heads, trained values and their share of the base model."""
    n = len(heads) * run.model.config.head_dim
    return {"heads": heads, "trained_values": n, "share_of_base": n / run.n_base}


def evaluate_fold(args: argparse.Namespace, run: Session) -> tuple[dict, dict]:
    """Score one fold; writes and prints its results. Returns them, and the scores of every item:
    {"base" or label: [...]}."""
    examples, batch_size = run.read(args.split), args.batch_size
    adapters, metadata = find_adapters(args, run), {}
    mine = run.info() | {"split": args.split}
    about = mine | {"n": len(examples)} | describe(run, [])
    memos = run.scored_batches(
        about | {"batch_size": batch_size, "compile": args.compile}, examples
    )
    if args.base_from:
        folder = args.base_from if run.fold is None else args.base_from / f"fold{run.fold}"
        scored = {"base": artefacts.read_base(folder, mine, [e.prompt for e in examples])}
    else:
        with edits_off(run.model):
            scored = {"base": evaluate(run, examples, batch_size, "base model", memos("base"))}
    for label, path in adapters.items():
        metadata[label] = attach(run, path)
        memo = memos(metadata[label]["offsets_hash"])
        scored[label] = evaluate(run, examples, batch_size, f"{label} model", memo)

    results = summarize(about, metadata, scored, run.task.METRICS)
    results |= by_answer(examples, scored) | by_group(examples, scored, run.task.METRICS)
    lines = [
        {key: value for key, value in asdict(example).items() if value}
        | {who: rows[i] for who, rows in scored.items()}
        for i, example in enumerate(examples)
    ]
    names = artefacts.results_files(args.split, args.base_only)
    artefacts.save_results(run.folder, results, lines, names)
    run.log({"results": results})
    print_results(f"{run.title}, {args.split} split ({len(examples)} items)", results)
    print_details(results)
    print(f"-> {run.folder / names[0]}, {names[1]}")
    return results, scored


def average(args: argparse.Namespace, run: Session, folds: list[tuple[dict, dict]]) -> None:
    """Results of both folds together, over all their items; writes and prints them."""
    (first, one), (second, other) = folds
    whole = {who: one[who] + other[who] for who in one}
    about = {k: first[k] for k in first if k not in ("settings", "fold", "offsets")}
    parts = [{k: r[k] for k in ("base", "tuned", "adapters") if k in r} for r in (first, second)]
    about |= {"n": first["n"] + second["n"], "folds": parts}
    metadata = {}
    for who in [who for who in whole if who != "base"]:
        both = [r["adapters"][who] if "adapters" in r else r for r in (first, second)]
        metadata[who] = {key: [r[key] for r in both] for key in ("heads", "offsets_hash")}
        metadata[who] |= {key: both[0][key] for key in ("trained_values", "share_of_base")}
    results = summarize(about, metadata, whole, tuple(first["base"]))
    write_json(run.base_folder / artefacts.results_files(args.split, args.base_only)[0], results)
    for label, own in (results.get("adapters") or {"": {}}).items():
        title = f"both folds, {results['n']} items{f', {label}' if label else ''}"
        print(f"\n{title}\n{results_table(results | own)}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.run = choose_run(args)
    # offsets from elsewhere have a folder of their own: the run's results stay
    run = Session(args, "eval", "-offsets" if args.offsets else "")
    if args.compile:
        run.decode_step = compiled_step()
    found = [evaluate_fold(args, run) for _ in run.folds()]
    if len(found) == 2:
        average(args, run, found)


if __name__ == "__main__":
    run_script(main)
