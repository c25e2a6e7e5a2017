"""Base model and tuned model side by side on a split.

python eval.py                             # offsets of the run -> results.json, predictions.jsonl
python eval.py --offsets runs/mini-llama/clutrr owner/adapter     # these, beside one another
python eval.py --split val --base-only
"""

import argparse
from dataclasses import fields
from pathlib import Path

from lofit import errors
from lofit.errors import InputError
from lofit.evaluation import BATCH, check_prompts, evaluate
from lofit.files import hash_of
from lofit.heads import edits_off, get_edits, set_edits
from lofit.llm.generate import Decoding
from lofit.run.arguments import METHODS, common_parser, natural, refuse
from lofit.run.files import (
    HEADS,
    OFFSETS,
    as_line,
    check_folds,
    check_made_for,
    edit_tensors,
    find_edits,
    load_offsets,
    save_results,
    warn_of_settings,
)
from lofit.run.setup import Run, open_runs, run_folder
from lofit.run.summary import by_answer, by_group, by_rule, print_details, results_table, summarize
from lofit.tasks import Example, find_tasks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    arg = parser.add_argument
    arg("--split", default="test", choices=("train", "val", "test"), help="which items"
        " (default: %(default)s)")  # fmt: skip
    arg("--offsets", nargs="+", default=[], metavar="ADAPTER", help="run folders, adapter folders"
        " or hub ids, of any task (default: the run's own)")  # fmt: skip
    arg("--base-only", action="store_true", help="no offsets, the base model alone")
    arg("--batch-size", type=natural, default=BATCH, help="items at once: memory, not results"
        " (default: %(default)s)")  # fmt: skip
    arg("--compile", action="store_true", help="the decoding step (for long runs on a GPU)")
    for flag in ("--heads", "--method"):  # train.py's: say what is meant
        arg(flag, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.base_only:
        refuse(parser, args, {"offsets": "--base-only asks the model alone"})
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    suffix = choose_suffix(args)
    asked: list[Example] = []
    pooled: dict[str, list[dict]] = {}
    with open_runs(args, "eval", suffix) as runs:
        for run in runs:
            examples, scored = evaluate_run(args, run)
            asked += examples
            for who, rows in scored.items():
                pooled.setdefault(who, []).extend(rows)
    if len(asked) > len(examples):  # both folds: each question was held out once
        whole = summarize(pooled, run.task.metrics, [e.unit for e in asked])
        print(f"\nboth folds, {len(asked)} items\n{results_table(whole)}")


def choose_suffix(args: argparse.Namespace) -> str:
    """Of the run folders of this model and task (LoFiT's, controls, baselines) the one that was
    trained last. Offsets from elsewhere have a folder of their own: the run's results stay."""
    tasks = find_tasks(args.task)

    def folders(suffix: str) -> list[Path]:
        return [run_folder(args, task, suffix, len(tasks) == 1) for task in tasks]

    if name := args.heads or args.method:
        where = folders(f"-{name}")[0]
        raise InputError(f"eval.py evaluates what was trained: name it by --run {where}")
    if args.offsets or args.run or args.base_only:
        return "-offsets" if args.offsets else ""
    times = {}
    for suffix in ("", *(f"-{name}" for name in ("random", "all", *METHODS[1:]))):
        trained = [folder / OFFSETS for folder in folders(suffix) if (folder / OFFSETS).exists()]
        if trained:
            times[suffix] = max(path.stat().st_mtime_ns for path in trained)
    latest, *others = sorted(times, key=times.get, reverse=True) or [""]
    if others:
        rest = ", ".join(str(folders(other)[0]) for other in others)
        print(f"evaluating {folders(latest)[0]}, trained last; --run chooses another: {rest}")
    return latest


def evaluate_run(args: argparse.Namespace, run: Run) -> tuple[list[Example], dict[str, list[dict]]]:
    """Score one task; writes and prints its results. Returns its items, and the rows of "base" and
    each label."""
    examples, decoding = run.read(args.split), None
    check_prompts(run, examples)
    names = [] if args.base_only else args.offsets or [str(run.folder)]
    # all files are read and fit before anything is scored
    adapters, edits = {}, {}
    labels = ["tuned"] if len(names) == 1 else [Path(name).name for name in names]
    # what stands beside them in the results; "base" is the model without edits
    taken = {"base", "n", *(field.name for field in fields(Example))}
    if len({*labels} - taken) < len(names):  # or one twice
        labels = [f"./{name}" if name in taken else name for name in names]
    for name, label in zip(names, labels, strict=True):
        adapters[label], edits[label] = attach(args, run, name), get_edits(run.model)
    if args.compile:
        from lofit.fast.decoding import compiled_step

        decoding = Decoding(compiled_step())

    # the same weights answer twice, so the two differ by the edits and by nothing else
    with edits_off(run.model):
        scored = {"base": evaluate(run, examples, args.batch_size, "base model", decoding)}
    for label in adapters:
        set_edits(run.model, edits[label])
        scored[label] = evaluate(run, examples, args.batch_size, f"{label} model", decoding)

    metrics = run.task.metrics
    # Intervals are of the difference between two answers to the same item: how hard the item is is
    # in both, and drops out.
    results = run.info | {"split": args.split, "n": len(examples), "adapters": adapters}
    results |= summarize(scored, metrics, [e.unit for e in examples])
    results |= by_answer(run.task, examples, scored) | by_rule(run.task, examples)
    results |= by_group(examples, scored, metrics)
    print(f"\n{run.title}, {args.split} split ({len(examples)} items)")
    for label, about in adapters.items():
        n, what = about["trained_values"], about.get("method") or f"{len(about['heads'])} heads"
        share = f"{n / run.model.source.n_parameters:.4%} of the base model"
        print(f"{label}: {what}, {n:,} trained values ({share}), seed {about.get('seed')}")
    print(results_table(results))
    print_details(results)
    # those of other splits, of the base alone and of other offsets never replace the test results
    # of the run that the folder has
    suffix = "" if args.split == "test" else f"-{args.split}"
    suffix += "-base" if args.base_only else ""
    suffix += "-offsets" if args.offsets and (run.folder / OFFSETS).exists() else ""
    lines = [
        as_line(example, {who: rows[i] for who, rows in scored.items()})
        for i, example in enumerate(examples)
    ]
    print(save_results(run.folder, suffix, results, lines))
    run.log({"results": results["scores"]})
    return examples, scored


def attach(args: argparse.Namespace, run: Run, name: str) -> dict:
    """Attach a file's edits; returns what the results say of it. Without --offsets they must be the
    run's own, and as new as its heads."""
    path, found, mine = find_edits(name), load_offsets(name, run.model), run.info
    if not args.offsets:
        check_made_for(path, found, mine, "train.py")
        chosen = hash_of(path.with_name(HEADS))
        if chosen and found.get("heads_hash", chosen) != chosen:
            raise InputError(
                f"{path}: trained before {HEADS} beside it was written; run train.py again, or"
                f" evaluate these all the same by --offsets {path.parent}"
            )
    check_folds(path, found, mine)
    warn_of_settings(path, found, mine, "trained", "evaluated", "dtype", "quantize", "chat")
    tensors = edit_tensors(run.model)
    about = {
        "trained_values": sum(t.numel() for key, t in tensors.items() if key != "heads"),
        "heads": tensors["heads"].tolist() if "heads" in tensors else [],
        "offsets": str(path),
        "offsets_hash": hash_of(path),
    }
    keys = ("task", "seed", "settings", "method")
    return about | {key: found[key] for key in keys if key in found}


def command() -> None:
    """As a program: errors are one line."""
    errors.run(main)


if __name__ == "__main__":
    command()
