"""Base model and tuned model side by side on a split.

python eval.py                             # offsets of the run -> results.json, predictions.jsonl
python eval.py --split val --base-only
"""

import argparse
import json

from lofit import errors
from lofit.files import write_json, write_text
from lofit.heads import edits_off, load_offsets
from lofit.report import mean, paired_bootstrap, results_table
from lofit.session import Session, add_common_args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_args(parser)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--base-only", action="store_true", help="no offsets, the base model alone")
    parser.add_argument("--batch-size", type=int, default=64)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run = Session(args, "eval")
    examples = run.read(args.split)
    heads, trained = [], {}
    if not args.base_only:
        path = run.folder / "offsets.safetensors"
        if not path.exists():
            raise errors.InputError(f"{path}: no such file; run train.py first, or use --base-only")
        heads, trained = load_offsets(path, run.model)
        if trained["task"] != run.task_name:
            raise errors.InputError(f"{path}: trained for {trained['task']}, not {run.task_name}")
    with edits_off(run.model):
        scored = {"base": run.predict(examples, args.batch_size, "base model")}
    if heads:
        scored["tuned"] = run.predict(examples, args.batch_size, "tuned model")

    results = run.info() | {"split": args.split, "n": len(examples), "heads": heads}
    if trained:
        results |= {"seed": trained["seed"], "settings": trained["settings"]}
    results["trained_values"] = len(heads) * run.model.config.head_dim
    results["share_of_base"] = results["trained_values"] / run.n_base
    for who, rows in scored.items():
        results[who] = {metric: mean([r[metric] for r in rows]) for metric in run.task.METRICS}
    if heads:
        results["difference"] = {
            metric: {
                "value": results["tuned"][metric] - results["base"][metric],
                "ci95": paired_bootstrap(*([r[metric] for r in scored[w]] for w in scored)),
            }
            for metric in run.task.METRICS
        }
    lines = [
        {"prompt": e.prompt, "references": e.references, "outdated": e.outdated}
        | {who: rows[i] for who, rows in scored.items()}
        for i, e in enumerate(examples)
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


if __name__ == "__main__":
    errors.run(main)
