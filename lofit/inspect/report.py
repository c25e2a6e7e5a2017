"""One page about one run or several: scores, chosen heads, training, answers, raised tokens.

    python -m lofit.inspect.report runs/mini-llama/mquake   # -> its report.html
    python -m lofit.inspect.report runs/mini-llama/truthfulqa-0 runs/mini-llama/truthfulqa-1

Several runs, the two folds of TruthfulQA for example, are parts of one page in the first one's
folder. The page is one file that needs no network and no script.
"""

import argparse
import itertools
import math
from pathlib import Path

import jinja2

from lofit import errors
from lofit.files import read_jsonl, write
from lofit.heads import attached_offsets
from lofit.inspect.explain import explain
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.files import HEADS, load_heads
from lofit.run.setup import pick_device
from lofit.run.summary import summarize
from lofit.run.tuned import Tuned, open_tuned, read_results

PAGE, TEMPLATE = "report.html", Path(__file__).with_name("report.html")
# how many items are shown, by whether the base model was right and whether the tuned one is
SHOWN = {(False, True): 6, (True, False): 3, (True, True): 1, (False, False): 2}
Curve = list[tuple[int, float]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("runs", metavar="RUN", nargs="+", help="run folders, of one model")
    arg("--model", help="where the base model is now (default: where the runs had it)")
    return parser.parse_args(argv)


def read_part(name: str, tuned: Tuned) -> dict:
    """What the page shows of one run. name: of its folder, "" of a run alone; results: None if
    these offsets were not evaluated; scores: [layer][head] of step 1, if it was run."""
    folder, scores = tuned.path.parent, None
    results, answers = read_results(tuned)
    if (folder / HEADS).exists():
        _, scores, _ = load_heads(folder / HEADS, tuned.model)
    return {
        "name": name,
        "info": tuned.info,
        "method": "LoFiT" if tuned.method == "lofit" else tuned.method,
        "heads": attached_offsets(tuned.model)[0],
        "explained": explain(tuned.model, load_tokenizer(tuned.base), 5),
        "results": results,
        "answers": answers,
        "scores": None if scores is None else scores.tolist(),
        "curves": read_curves(lines_of(folder / "log.jsonl")),
    }


def lines_of(path: Path) -> list[dict]:
    return [line for _, line in read_jsonl(path)] if path.exists() else []


def read_curves(log: list[dict]) -> dict[str, Curve]:
    """log.jsonl -> (epoch, value) of the losses and the validation metrics, these in percent, of
    the last training in it."""
    curves: dict[str, dict[int, float]] = {}
    for record in log:
        if record.get("script") == "train" and "val" in record:
            if record["epoch"] == 1:  # a new training
                curves = {}
            val = dict(record["val"])
            values = {"training loss": record["train_loss"], "validation loss": val.pop("loss")}
            values |= {name: 100 * value for name, value in val.items()}
            for label, value in values.items():
                curves.setdefault(label, {})[record["epoch"]] = value
    return {label: sorted(points.items()) for label, points in curves.items()}


def plots(parts: list[dict]) -> list[dict]:
    """The losses and the validation scores, to be drawn in a box of 100 x 100: where the axes end,
    and each curve's label and points."""
    found = []
    for caption, of_loss in (
        ("Loss of step 2", True),
        ("Scores on the validation split, %", False),
    ):
        curves = {
            f"{part['name']} {label}".strip(): points
            for part in parts
            for label, points in part["curves"].items()
            if label.endswith("loss") == of_loss
        }
        if curves:
            end, highest = (max(max(p[i] for p in c) for c in curves.values()) for i in (0, 1))
            digit = 10 ** math.floor(math.log10(highest or 1))
            top = math.ceil((highest or 1) / digit) * digit  # its first digit, rounded up
            drawn = {
                label: " ".join(f"{100 * x / end:.2f},{100 - 100 * y / top:.2f}" for x, y in points)
                for label, points in curves.items()
            }
            found.append({"caption": caption, "end": end, "top": top, "curves": drawn})
    return found


def answer_of(line: dict, who: str) -> str:
    """What a model answered to an item of predictions.jsonl: its text, or the given answer that it
    finds most probable."""
    if "prediction" in line[who]:
        return line[who]["prediction"].strip()
    answers = [*line["right"], *line["wrong"]]
    scores = [*line[who]["log_probs"]["right"], *line[who]["log_probs"]["wrong"]]
    return answers[scores.index(max(scores))].strip()


def gold_of(line: dict) -> str:
    """The gold answer: of several the first; a number without the text that leads to it."""
    if "value" in line:
        return f"{line['value']:.15g}"
    return (line.get("references") or line.get("right") or [line["answer"]])[0].strip()


def pick_answers(lines: list[dict], metric: str) -> list[dict]:
    """A dozen items, each with the gold answer, and both models' with whether it is right."""
    kinds: dict[tuple[bool, bool], list[dict]] = {kind: [] for kind in SHOWN}
    for line in lines:
        answers = [(who, answer_of(line, who), line[who][metric] == 1) for who in ("base", "tuned")]
        item = {"question": line["prompt"].strip(), "gold": gold_of(line), "answers": answers}
        kinds[tuple(right for *_, right in answers)].append(item)
    return [item for kind, n in SHOWN.items() for item in kinds[kind][:n]]


def all_folds(parts: list[dict]) -> dict:
    """The results of both folds of TruthfulQA together, each question held out once; {} of other
    runs."""
    tasks = sorted(str(part["info"].get("task")) for part in parts)
    if tasks != ["truthfulqa-0", "truthfulqa-1"] or not all(part["answers"] for part in parts):
        return {}
    first, lines = parts[0]["results"], [line for part in parts for line in part["answers"]]
    scored = {who: [line[who] for line in lines] for who in ("base", "tuned")}
    whole = {"split": first["split"], "n": len(lines)}
    units = [line.get("unit", "") for line in lines]
    return {"both folds": whole | summarize(scored, tuple(first["scores"]["base"]), units)}


def page(runs: list[str], model: str | None = None) -> tuple[Path, str]:
    """(where to write it, the page) of one or more runs. InputError if one holds no offsets that
    fit their base model."""
    parts, out, names = [], None, [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = runs
    for run, name in zip(runs, names if runs[1:] else [""], strict=True):
        tuned = open_tuned(run, model, device=pick_device("auto"))
        out = out or tuned.folder_to_write / PAGE
        parts.append(read_part(name, tuned))
    results = all_folds(parts) | {p["name"]: p["results"] for p in parts if p["results"]}
    # the first metric is the main one
    metric = next((next(iter(r["scores"]["base"])) for r in results.values()), "")
    # an item of each run in turn
    lines = itertools.chain(*itertools.zip_longest(*(part["answers"] for part in parts)))
    answers = pick_answers([line for line in lines if line and metric in line["base"]], metric)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        parts=parts, info=parts[0]["info"], results=results, metric=metric, answers=answers,
        plots=plots(parts),
    )  # fmt: skip
    return out, text


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out, text = page(args.runs, args.model)
    write(out, text)
    print(f"-> {out}")


if __name__ == "__main__":
    errors.run(main)
