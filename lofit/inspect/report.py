"""A run as one page to look at: what was learned, how well it does, which answers changed.

    python -m lofit.inspect.report runs/mini-llama/mquake   # -> its report.html

A run in folds is one page; RUN/fold0 is that fold alone. The page needs no network and no script.
Its pictures need matplotlib (the `plot` extra).
"""

import argparse
import base64
import difflib
import io
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup, escape

from lofit import errors
from lofit.files import read_jsonl, write_text
from lofit.inspect.explain import explain_run
from lofit.llm.files import read_json
from lofit.llm.folder import find_folder
from lofit.run.adapters import Adapter, find_offsets, matching_results
from lofit.run.arguments import TASKS
from lofit.run.artefacts import HEADS, OFFSETS, PREDICTIONS, RESULTS, hash_of_offsets

PAGE, TEMPLATE = "report.html", Path(__file__).with_name("report.html")
SHOWN = 12  # answers
LOG = "log.jsonl"
DASHES = ["-", "--", ":", "-."]
Curve = list[tuple[float, float]]


@dataclass
class Part:
    """A run, or one fold of it. results: None if these offsets were not evaluated; scores
    [layer, head]: of step 1, if it was run; curves: see `read_curves`."""

    name: str  # "fold 0"; "" of a run without folds, or of one fold alone
    adapter: Adapter
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
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--model", help="where the base model is (default: where the run had it)")
    return parser.parse_args(argv)


def read_curves(log: list[dict]) -> dict[str, Curve]:
    """log.jsonl -> (epoch, value) of the training loss of each step, and of the validation loss and
    metrics (in percent) of each epoch, of the last training in it."""
    steps = [r for r in log if r.get("script") == "train"]
    starts = [i for i, r in enumerate(steps) if r.get("step") == 1]
    steps = steps[starts[-1] :] if starts else []
    losses = [r for r in steps if "task_loss" in r]
    epochs = max((r["epoch"] for r in losses), default=1)
    found = {"training loss": [(r["step"] * epochs / len(losses), r["task_loss"]) for r in losses]}
    validated = [r for r in steps if "val_loss" in r]
    found["validation loss"] = [(r["epoch"], r["val_loss"]) for r in validated]
    for metric in validated[0]["val"] if validated else ():
        found[metric] = [(r["epoch"], 100 * r["val"][metric]) for r in validated]
    return found


def once(found: dict[str, Curve]) -> dict[str, Curve]:
    """The curves that are not empty, identical ones as one with the labels of all."""
    labels: dict[tuple, list[str]] = {}
    for label, points in found.items():
        if points:
            labels.setdefault(tuple(points), []).append(label)
    return {" = ".join(same): list(points) for points, same in labels.items()}


def said(line: dict, who: str) -> str:
    """What a model answered to an item of predictions.jsonl: its text, or the given answer that it
    finds most probable."""
    if "prediction" in line[who]:
        return line[who]["prediction"].strip()
    answers = [*line["right"], *line["wrong"]]
    scores = [*line[who]["log_probs"]["right"], *line[who]["log_probs"]["wrong"]]
    return answers[max(range(len(answers)), key=scores.__getitem__)].strip()


def pick_answers(lines: list[dict], metric: str) -> list[dict]:
    """A dozen items: of those that became right, became wrong, and stayed, in turn."""
    kinds: dict[str, list[dict]] = {"became right": [], "became wrong": [], "stayed": []}
    for line in lines:
        before, after = line["base"][metric], line["tuned"][metric]
        kind = "became right" if after > before else "became wrong" if after < before else "stayed"
        was, now = said(line, "base"), said(line, "tuned")
        question = line["prompt"].strip()
        kinds[kind].append({"question": question, "kind": kind} | marked(was, now))
    shares = {"became right": SHOWN // 2, "became wrong": SHOWN // 4, "stayed": SHOWN // 4}
    picked = [item for kind, n in shares.items() for item in kinds[kind][:n]]
    return picked


def marked(was: str, now: str) -> dict[str, Markup]:
    """Both answers as HTML, the words that differ in <del> and <ins>; all text is escaped."""
    one, two = (re.findall(r"\s+|\S+", text) for text in (was, now))
    before, after = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        old, new = escape("".join(one[a:b])), escape("".join(two[c:d]))
        before.append(old if kind == "equal" or not old else Markup("<del>{}</del>").format(old))
        after.append(new if kind == "equal" or not new else Markup("<ins>{}</ins>").format(new))
    return {"was": Markup("").join(before), "now": Markup("").join(after)}


def pictures(parts: list[Part]) -> list[tuple[str, str]] | None:
    """(caption, data: URL of an SVG) of each head map, the losses and the validation scores; None
    where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 10, "svg.fonttype": "path"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    made = []

    def add(caption: str, figure) -> None:
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True)
        plt.close(figure)
        url = "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
        made.append((caption, url))

    with plt.rc_context(style):
        for part in parts:
            if part.scores is not None:
                height = 0.9 + 0.16 * len(part.scores)
                figure, axes = plt.subplots(figsize=(5, height), layout="constrained")
                draw_heads(axes, part.scores, part.adapter.heads)
                caption = "Score of every head in step 1; the chosen ones are framed"
                add(f"{part.name}: {caption}" if part.name else caption, figure)
        for caption, of_loss in (("Loss of step 2, the offsets", True), ("Validation, %", False)):
            figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
            draw_curves(axes, parts, of_loss)
            add(caption, figure) if axes.lines else plt.close(figure)
    return made


def draw_heads(axes, scores: torch.Tensor, heads: list) -> None:
    """Map of layers x heads. scores: [layer, head]."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(scores.numpy(), origin="lower", cmap="Blues", aspect="auto")
    for layer, head in heads:
        square = Rectangle((head - 0.4, layer - 0.4), 0.8, 0.8, fill=False, ec="#d55e00", lw=1.5)
        axes.add_patch(square)
    axes.set(xlabel="head", ylabel="layer")
    axes.locator_params(integer=True)
    axes.figure.colorbar(image, label="score")


def draw_curves(axes, parts: list[Part], of_loss: bool) -> None:
    """The losses, or the scores, over epochs: a colour for each fold, where there are any. The
    value axis starts at 0, unless all curves would be flat lines there."""
    lines, styles = {}, {}
    for n, part in enumerate(parts):
        mine = {k: points for k, points in part.curves.items() if k.endswith("loss") == of_loss}
        for i, (label, points) in enumerate(once(mine).items()):
            lines[f"{part.name}: {label}" if part.name else label] = points
            style = {"color": f"C{n}", "ls": DASHES[i % 4]} if part.name else {"color": f"C{i}"}
            thin = label.startswith("training")
            style |= {"alpha": 0.5, "lw": 1, "ls": "-"} if thin else {"marker": "."}
            styles.setdefault(tuple(points), style)
    drawn = once(lines)
    if not drawn:
        return
    for label, points in drawn.items():
        axes.plot(*zip(*points, strict=True), label=label, **styles[tuple(points)])
    epochs, values = zip(*itertools.chain(*drawn.values()), strict=True)
    axes.set(xlabel="epoch", xlim=limits_of_epochs(min(epochs), max(epochs)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not 0 < max(values) - min(values) < max(values) / 10:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def limits_of_epochs(first: float, last: float) -> tuple[float, float]:
    """From 0 where steps of epoch 1 are shown, which lie below 1; else from 1, less a margin that
    leaves room for the first dot."""
    start = 0.0 if first < 1 else 1.0
    margin = 0.03 * (last - start) or 0.5
    return start - margin, last + margin


def read_part(name: str, path: Path, model: str | None) -> Part:
    """A run or a fold, from the file of its offsets."""
    run = path.parent
    explained, adapter = explain_run(str(run), model, 5)
    results, answers, log, scores = adapter.results(), [], [], None
    if results and (run / PREDICTIONS).exists():
        answers = [line for _, line in read_jsonl(run / PREDICTIONS)]
    if (run / LOG).exists():
        log = [record for _, record in read_jsonl(run / LOG)]
    if (run / HEADS).exists():
        scores = torch.tensor(read_json(run / HEADS)["scores"])
    return Part(name, adapter, explained, results, answers, scores, read_curves(log))


def read_parts(run: str, model: str | None) -> tuple[Path, list[Part]]:
    """(the run's folder, the run as one part, or its trained folds). InputError if it holds no
    offsets that fit their base model."""
    folder = find_folder(run, wanted=(f"*{OFFSETS}",))
    folds = [] if (folder / OFFSETS).exists() else sorted(folder.glob(f"fold*/{OFFSETS}"))
    if folds:
        names = {path.parent.name.replace("fold", "fold "): path for path in folds}
        return folder, [read_part(name, path, model) for name, path in names.items()]
    path = find_offsets(run)
    return path.parent, [read_part("", path, model)]


def read_results(folder: Path, parts: list[Part]) -> dict[str, dict]:
    """What was evaluated, by what it is of: all folds together, if the joint results are of these
    offsets, then each part."""
    found = {part.name: part.results for part in parts if part.results}
    hashes = [hash_of_offsets(part.adapter.heads, part.adapter.offsets) for part in parts]
    joint = matching_results(folder / RESULTS, parts[0].adapter.info.get("fingerprint"), hashes)
    return ({"all folds": joint} if joint else {}) | found


def main_metric(task: str | None, results: dict[str, dict]) -> str:
    """The metric to judge a task by; of a task of one's own the first. "" without results."""
    metrics = list(next(iter(results.values()))["base"]) if results else [""]
    main = TASKS[task].MAIN_METRIC if task in TASKS else ""
    return main if main in metrics else metrics[0]


def page(run: str, model: str | None = None) -> tuple[Path, str]:
    """(where to write it, the page) of a run. InputError if it holds no offsets that fit their base
    model."""
    folder, parts = read_parts(run, model)
    results = read_results(folder, parts)
    # in turn of each fold
    lines = [line for lines in itertools.zip_longest(*(p.answers for p in parts)) for line in lines]
    metric = main_metric(parts[0].adapter.info.get("task"), results)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        parts=parts, info=parts[0].adapter.info, results=results, metric=metric,
        answers=pick_answers([line for line in lines if line], metric), pictures=pictures(parts),
    )  # fmt: skip
    return replace(parts[0].adapter, folder=folder).folder_to_write() / PAGE, text


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out, text = page(args.run, args.model)
    write_text(out, text)
    print(f"-> {out}")


if __name__ == "__main__":
    errors.run(main)
