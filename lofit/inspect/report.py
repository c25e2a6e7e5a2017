"""Runs as one page to look at: what was learned, how well it does, which answers changed.

    python -m lofit.inspect.report runs/mini-llama/mquake   # -> its report.html
    python -m lofit.inspect.report runs/mini-llama/truthfulqa-0 runs/mini-llama/truthfulqa-1

Several runs, the two folds of TruthfulQA for example, are parts of one page in the first one's
folder. The page needs no network and no script. Its pictures need matplotlib (the `plot` extra).
"""

import argparse
import base64
import io
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import torch

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
# answers that are shown, by what became of them
SHOWN = {"became right": 6, "became wrong": 3, "stayed right": 1, "stayed wrong": 2}
STYLE = {"font.size": 10, "svg.fonttype": "path"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
Curve = list[tuple[float, float]]


@dataclass
class Part:
    """One run. name: of its folder, "" of a run alone; results: None if these offsets were not
    evaluated; scores: [layer, head] of step 1, if it was run; curves: see `read_curves`."""

    name: str
    info: dict
    heads: list
    explained: dict
    results: dict | None
    answers: list[dict]
    scores: torch.Tensor | None
    curves: dict[str, Curve]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", nargs="+", help="run folders, of one model")
    parser.add_argument("--model", help="where the base model is (default: where the run had it)")
    return parser.parse_args(argv)


def read_part(name: str, tuned: Tuned) -> Part:
    folder, scores = tuned.path.parent, None
    (results, answers), curves = read_results(tuned), read_curves(lines_of(folder / "log.jsonl"))
    if (folder / HEADS).exists():
        _, scores, _ = load_heads(folder / HEADS, tuned.model)
    heads, _ = attached_offsets(tuned.model)
    explained = explain(tuned.model, load_tokenizer(tuned.base), 5)
    return Part(name, tuned.info, heads, explained, results, answers, scores, curves)


def lines_of(path: Path) -> list[dict]:
    return [line for _, line in read_jsonl(path)] if path.exists() else []


def read_curves(log: list[dict]) -> dict[str, Curve]:
    """log.jsonl -> (epoch, value) of the training loss of each step, and of the validation loss and
    metrics (in percent) of each epoch, of the last training in it."""
    records = [r for r in log if r.get("script") == "train"]
    starts = [i for i, r in enumerate(records) if r.get("step") == 1]
    records = records[starts[-1] :] if starts else []
    # a training that was stopped goes on after its last whole epoch: what stands twice counts as
    # it was the second time
    steps = {r["step"]: r for r in records if "task_loss" in r}
    epochs = {r["epoch"]: r["val"] for r in records if "val" in r}
    last = max((r["epoch"] for r in steps.values()), default=1)
    per_epoch = max(steps, default=1) / last
    found = [(n / per_epoch, steps[n]["task_loss"]) for n in sorted(steps)]
    curves = {"training loss": found} if found else {}
    for epoch in sorted(epochs):
        for name, value in epochs[epoch].items():
            label, scale = ("validation loss", 1) if name == "loss" else (name, 100)
            curves.setdefault(label, []).append((epoch, scale * value))
    return curves


def answer_of(line: dict, who: str) -> str:
    """What a model answered to an item of predictions.jsonl: its text, or the given answer that it
    finds most probable."""
    if "prediction" in line[who]:
        return line[who]["prediction"].strip()
    answers = [*line["right"], *line["wrong"]]
    scores = [*line[who]["log_probs"]["right"], *line[who]["log_probs"]["wrong"]]
    return answers[max(range(len(answers)), key=scores.__getitem__)].strip()


def gold_of(line: dict) -> str:
    """The right answer: of several the first; a number as it was given."""
    first = next(iter(line.get("references") or line.get("right") or [line["answer"]]))
    return f"{line['value']:g}" if "value" in line else first.strip()


def pick_answers(lines: list[dict], metric: str) -> list[dict]:
    """A dozen items, each with the gold answer and whether the two models' are right."""
    kinds: dict[str, list[dict]] = {kind: [] for kind in SHOWN}
    for line in lines:
        answers = {who: (answer_of(line, who), line[who][metric] == 1) for who in ("base", "tuned")}
        before, after = (right for _, right in answers.values())
        kind = f"{'stayed' if before == after else 'became'} {'right' if after else 'wrong'}"
        item = {"kind": kind, "question": line["prompt"].strip(), "gold": gold_of(line)}
        kinds[kind].append(item | {"answers": answers})
    return [item for kind, n in SHOWN.items() for item in kinds[kind][:n]]


def pictures(parts: list[Part]) -> list[tuple[str, str]] | None:
    """(caption, data: URL of an SVG) of each head map, the losses and the validation scores; None
    where matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    wanted = []
    for part in parts:
        if part.scores is not None:
            caption = f"{of(part)}Score of every head in step 1; the chosen ones are framed"
            wanted.append((caption, 0.9 + 0.16 * len(part.scores), partial(draw_heads, part)))
    for caption, of_loss in (("Loss of step 2, the offsets", True), ("Validation, %", False)):
        if any(label.endswith("loss") == of_loss for part in parts for label in part.curves):
            wanted.append((caption, 2.6, partial(draw_curves, parts, of_loss)))
    made = []
    with rc_context(STYLE):
        for caption, height, draw in wanted:
            figure, out = Figure(figsize=(5, height), layout="constrained"), io.BytesIO()
            draw(figure.subplots())
            figure.savefig(out, format="svg", transparent=True)
            code = base64.b64encode(out.getvalue()).decode()
            made.append((caption, f"data:image/svg+xml;base64,{code}"))
    return made


def of(part: Part) -> str:
    return f"{part.name}: " if part.name else ""


def draw_heads(part: Part, axes) -> None:
    """Map of layers x heads."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(part.scores.numpy(), origin="lower", cmap="Blues", aspect="auto")
    for layer, head in part.heads:
        square = Rectangle((head - 0.4, layer - 0.4), 0.8, 0.8, fill=False, ec="#d55e00", lw=1.5)
        axes.add_patch(square)
    axes.set(xlabel="head", ylabel="layer")
    axes.locator_params(integer=True)
    axes.figure.colorbar(image, label="score")


def draw_curves(parts: list[Part], of_loss: bool, axes) -> None:
    """The losses, or the scores, over epochs: a colour for each run, or for each curve of one run.
    Dashes differ, so that of equal curves all are seen."""
    for n, part in enumerate(parts):
        mine = [label for label in part.curves if label.endswith("loss") == of_loss]
        for i, label in enumerate(mine):
            style = {"color": f"C{n if part.name else i}", "ls": ["-", "--", ":", "-."][i % 4]}
            style |= {"alpha": 0.5, "lw": 1} if label == "training loss" else {"marker": "."}
            points = zip(*part.curves[label], strict=True)
            axes.plot(*points, label=of(part) + label, **style)
    axes.set(xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def all_folds(parts: list[Part]) -> dict | None:
    """The results of both folds of TruthfulQA together: each question was held out once."""
    both = sorted(str(part.info.get("task")) for part in parts) == ["truthfulqa-0", "truthfulqa-1"]
    if not both or not all(part.results and part.answers for part in parts):
        return None
    lines = [line for part in parts for line in part.answers]
    metrics = tuple(parts[0].results["scores"]["base"])
    scored = {who: [line[who] for line in lines] for who in ("base", "tuned")}
    return {"split": parts[0].results["split"], "n": len(lines)} | summarize(scored, metrics)


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
    whole = all_folds(parts)
    results = {"both folds": whole} if whole else {}
    results |= {part.name: part.results for part in parts if part.results}
    # the first metric is the main one
    metric = next(iter(next(iter(results.values()))["scores"]["base"])) if results else ""
    # in turn of each run
    lines = [line for lines in itertools.zip_longest(*(p.answers for p in parts)) for line in lines]
    answers = pick_answers([line for line in lines if line and metric in line["base"]], metric)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        parts=parts, info=parts[0].info, results=results, metric=metric, answers=answers,
        pictures=pictures(parts),
    )  # fmt: skip
    return out, text


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out, text = page(args.run, args.model)
    write(out, text)
    print(f"-> {out}")


if __name__ == "__main__":
    errors.run(main)
