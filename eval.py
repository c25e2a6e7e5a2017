"""Base model and tuned model side by side on a split.

python eval.py                             # offsets of the run -> results.json, predictions.jsonl
python eval.py --split val --base-only
"""

import argparse
import json
from dataclasses import asdict

from lofit import errors
from lofit.files import write_json, write_text
from lofit.generate import compiled_step
from lofit.heads import Head, edits_off, load_offsets
from lofit.report import mean, paired_bootstrap, results_table
from lofit.session import Session, add_common_args, folds_of, run_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_args(parser)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--base-only", action="store_true", help="no offsets, the base model alone")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="the decoding step (for GPUs)")
    return parser.parse_args(argv)


def attach_trained(run: Session) -> tuple[list[Head], dict]:
    """Attach the offsets of the run folder; returns heads and `info`. InputError on a mismatch."""
    path = run.folder / "offsets.safetensors"
    if not path.exists():
        raise errors.InputError(f"{path}: no such file; run train.py first, or use --base-only")
    heads, trained = load_offsets(path, run.model)
    mine = run.info()
    for key in ("task", "fold", "chat"):
        if trained.get(key) != mine[key]:
            raise errors.InputError(
                f"{path}: trained with {key} {trained.get(key)}, asked for {key} {mine[key]}"
            )
    return heads, trained


def evaluate(args: argparse.Namespace, fold: int | None) -> tuple[dict, dict[str, list[dict]]]:
    """Score one fold; writes and prints its results. Returns them and the scores of every item."""
    run = Session(args, "eval", fold)
    examples = run.read(args.split)
    heads, trained = ([], {}) if args.base_only else attach_trained(run)
    if args.compile:
        run.decode_step = compiled_step()
    with edits_off(run.model):
        scored = {"base": run.evaluate(examples, args.batch_size, "base model")}
    if heads:
        scored["tuned"] = run.evaluate(examples, args.batch_size, "tuned model")

    results = run.info() | {"split": args.split, "n": len(examples), "heads": heads}
    if trained:
        results |= {"seed": trained["seed"], "settings": trained["settings"]}
    results["trained_values"] = len(heads) * run.model.config.head_dim
    results["share_of_base"] = results["trained_values"] / run.n_base
    results |= summary(scored, run.task.METRICS)
    lines = [
        {key: value for key, value in asdict(example).items() if value}
        | {who: rows[i] for who, rows in scored.items()}
        for i, example in enumerate(examples)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(run.folder / "predictions.jsonl", text)
    write_json(run.folder / "results.json", results)
    run.log({"results": results})
    print(
        f"\n{run.title}, {args.split} split ({len(examples)} items), {len(heads)} heads,"
        f" {results['trained_values']:,} trained values ({results['share_of_base']:.4%} of the base"
        f" model), seed {results['seed']}\n{results_table(results)}"
    )
    print(f"-> {run.folder / 'results.json'}, predictions.jsonl")
    return results, scored


def summary(scored: dict[str, list[dict]], metrics: tuple[str, ...]) -> dict:
    """Means of each model and their difference with its interval."""
    found: dict = {
        who: {metric: mean([row[metric] for row in rows]) for metric in metrics}
        for who, rows in scored.items()
    }
    if "tuned" in scored:
        found["difference"] = {
            metric: {
                "value": found["tuned"][metric] - found["base"][metric],
                "ci95": paired_bootstrap(*([row[metric] for row in scored[w]] for w in scored)),
            }
            for metric in metrics
        }
    return found


def average(args: argparse.Namespace, folds: list[tuple[dict, dict[str, list[dict]]]]) -> None:
    """Results of both folds together, over all their items; writes and prints them."""
    (first, one), (second, other) = folds
    whole = {who: one[who] + other[who] for who in one}
    results = {k: first[k] for k in first if k not in ("heads", "settings", "fold")} | {
        "n": first["n"] + second["n"],
        "heads": [first["heads"], second["heads"]],
        "folds": [{k: r[k] for k in ("base", "tuned") if k in r} for r in (first, second)],
    }
    results |= summary(whole, tuple(first["base"]))
    write_json(run_folder(args) / "results.json", results)
    print(f"\nboth folds, {results['n']} items\n{results_table(results)}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = [evaluate(args, fold) for fold in folds_of(args)]
    if len(found) == 2:
        average(args, found)


if __name__ == "__main__":
    errors.run(main)
