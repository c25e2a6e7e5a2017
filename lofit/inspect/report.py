"""A run as one page to look at: what was learned, how well it does, which answers changed.

    python -m lofit.inspect.report runs/mini-llama/mquake   # -> its report.html

The page needs no network and no script. Its pictures need matplotlib (the `plot` extra).
"""

import argparse
import base64
import difflib
import io
import re
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup, escape

from lofit import errors
from lofit.files import read_jsonl, write_text
from lofit.inspect.explain import explain_run
from lofit.llm.files import read_json
from lofit.run.adapters import find_offsets, open_adapter
from lofit.run.artefacts import PREDICTIONS, read_offsets

PAGE, TEMPLATE = "report.html", Path(__file__).with_name("report.html")
SHOWN = 12  # answers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder; of a task in folds, one fold's")
    parser.add_argument("--model", help="where the base model is (default: where the run had it)")
    return parser.parse_args(argv)


def curves(log: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """log.jsonl -> (epoch, value) of the training loss of each step, and of the validation loss and
    main metric of each epoch, of the last training in it."""
    steps = [r for r in log if r.get("script") == "train"]
    starts = [i for i, r in enumerate(steps) if r.get("step") == 1]
    steps = steps[starts[-1] :] if starts else []
    losses = [r for r in steps if "task_loss" in r]
    epochs = max((r["epoch"] for r in losses), default=1)
    found = {"training loss": [(r["step"] * epochs / len(losses), r["task_loss"]) for r in losses]}
    validated = [r for r in steps if "val_loss" in r]
    found["validation loss"] = [(r["epoch"], r["val_loss"]) for r in validated]
    for metric in validated[0]["val"] if validated else ():
        found[f"validation {metric}"] = [(r["epoch"], r["val"][metric]) for r in validated]
    return found


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


def pictures(found: dict[str, list], scores: torch.Tensor | None, heads: list) -> dict | None:
    """Head map and curves as data: URLs of SVG; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def url(figure) -> str:
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True)
        plt.close(figure)
        return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()

    made = {}
    with plt.rc_context(
        {
            "font.size": 10,
            "svg.fonttype": "path",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        if scores is not None:
            figure, axes = plt.subplots(figsize=(5, 0.9 + 0.16 * len(scores)), layout="constrained")
            image = axes.imshow(scores.numpy(), origin="lower", cmap="Blues", aspect="auto")
            layers, columns = zip(*heads, strict=True)
            axes.scatter(columns, layers, marker="s", s=26, facecolors="none", edgecolors="crimson")
            axes.set(xlabel="head", ylabel="layer")
            figure.colorbar(image, label="score")
            made["heads"] = url(figure)
        for name, names in (
            ("loss", [n for n in found if n.endswith("loss")]),
            ("metrics", [n for n in found if not n.endswith("loss")]),
        ):
            figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
            for label in names:
                if found[label]:
                    x, y = zip(*found[label], strict=True)
                    thin = (
                        {"alpha": 0.5, "lw": 1} if label.startswith("training") else {"marker": "."}
                    )
                    axes.plot(x, y, label=label, **thin)
            axes.set(xlabel="epoch")
            if axes.lines:
                axes.legend(frameon=False)
                made[name] = url(figure)
    return made


def page(run: Path, model: str | None = None) -> str:
    """report.html of a run folder. InputError if it holds no offsets that fit their base model."""
    path = find_offsets(run)
    run = path.parent
    heads, offsets, info = read_offsets(path)
    explained, adapter = explain_run(str(run), model, 5)
    results = adapter.results()
    answers, log, scores = [], [], None
    if results and (run / PREDICTIONS).exists():
        lines = [line for _, line in read_jsonl(run / PREDICTIONS)]
        answers = pick_answers(lines, next(iter(results["base"])))
    if (run / "log.jsonl").exists():
        log = [record for _, record in read_jsonl(run / "log.jsonl")]
    if (run / "heads.json").exists():
        scores = torch.tensor(read_json(run / "heads.json")["scores"])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        info=info, results=results, answers=answers, explained=explained,
        n_values=offsets.numel(), pictures=pictures(curves(log), scores, heads), heads=heads,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    text = page(Path(args.run), args.model)
    out = open_adapter(args.run).folder_to_write() / PAGE
    write_text(out, text)
    print(f"-> {out}")


if __name__ == "__main__":
    errors.run(main)
