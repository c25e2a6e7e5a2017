"""Accuracy against the number of heads: chosen heads beside random ones, each dot one recorded run.

    python -m lofit.studies.picture --out docs/heads.png

One panel a model and task. The runs drawn are LoFiT's of the records' folder that were tested, with
heads chosen for the task itself, all training examples, and the recipe's learning rate and epochs.
A short line is the mean of the dots beside it. The line of LoRA is the mean of its runs with the
learning rate whose runs did best on validation in the mean.
"""

import argparse
import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from lofit import errors
from lofit.errors import InputError
from lofit.files import write
from lofit.run.summary import mean
from lofit.studies.cells import validation
from lofit.studies.records import Records, Run
from lofit.studies.tables import n_heads
from lofit.tasks import main_metric

# how heads were chosen -> legend, colour (Okabe and Ito's, which colour-blind readers can tell
# apart), marker, place beside its number of heads
WAYS = {
    "scales": ("chosen by scales (LoFiT)", "#0072B2", "o", -1),
    "gradient": ("chosen by gradients", "#009E73", "^", 0),
    "random": ("drawn at random", "#D55E00", "x", 1),
    "all": ("all heads", "#222222", "s", 0),
}
TITLES = {"mquake": "MQuAKE", "clutrr": "CLUTRR", "truthfulqa": "TruthfulQA"}
TITLES |= {"em": "exact match", "em_stripped": "exact match", "mc1": "MC1"}


@dataclass
class Panel:
    """What one panel shows, in percent. dots: for each way of choosing, (number of heads, as --top
    takes it) -> the score of each run; base, lora: a score, or None if it is not recorded."""

    base: float | None = None
    lora: float | None = None
    dots: dict[str, dict[tuple[int, str], list[float]]] = field(default_factory=dict)


def read_panel(records: Records, model: str, task: str, data: str, dtype: str) -> Panel:
    """The recorded runs of a model and task."""
    metric, found = main_metric(task), Panel()
    dots, lora = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for run, line in records.of_model(model).items():
        if (run.task, run.data, run.dtype, run.quantize) != (task, data, dtype, ""):
            continue
        if run.kind == "base" and "base" in line:
            found.base = 100 * line["base"][metric]
        if run.kind != "train" or "tuned" not in line:
            continue
        score = 100 * line["tuned"][metric]
        if run.method == "lofit" and run.by in WAYS and is_plain(run):
            dots[run.by][n_heads(line), run.k].append(score)
        if run.method == "lora" and len(run.train.split()) == 2:  # a learning rate alone
            lora[run.train].append((validation(records, run), score))
    found.dots = {by: dict(sorted(dots[by].items())) for by in WAYS if by in dots}
    if lora:
        best = max(lora.values(), key=lambda runs: mean([val for val, _ in runs]))
        found.lora = mean([score for _, score in best])
    return found


def is_plain(run: Run) -> bool:
    """Whether a run of LoFiT has the recipe's values. The recipe bounds TruthfulQA's learning rate
    by 0.03; runs from before it did so name it."""
    bound = run.task == "truthfulqa" and run.by != "all" and run.train == "--lr 0.03"
    return run.lr_factor == 1 and not (run.select or run.heads_of or (run.train and not bound))


def draw(panels: dict[tuple[str, str], Panel], path: Path) -> None:
    """Write the panels of (model, task) as a PNG, a row a model. InputError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise InputError('a picture needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models, tasks = (list(dict.fromkeys(part)) for part in zip(*panels, strict=True))
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    legend = {}
    with plt.rc_context(style):
        size = (0.6 + 2.8 * len(tasks), 0.9 + 2.3 * len(models))
        figure, grid = plt.subplots(
            len(models), len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for model, line in zip(models, grid, strict=True):
            shown = [panels[model, task] for task in tasks]
            heads = sorted({k for panel in shown for of_k in panel.dots.values() for k in of_k})
            for axes, panel in zip(line, shown, strict=True):
                draw_panel(axes, panel, heads)
                legend |= {line.get_label(): line for line in axes.get_lines()}
            line[0].set_ylabel(f"{Path(model).name}\ntest accuracy, %")
        for task, axes in zip(tasks, grid[0], strict=True):
            metric = main_metric(task)
            axes.set_title(f"{TITLES.get(task, task)}, {TITLES.get(metric, metric)}", fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("number of heads")
        named = {label: line for label, line in legend.items() if label[0] != "_"}
        place = {"loc": "outside upper center", "frameon": False, "columnspacing": 1.3}
        figure.legend(named.values(), named, ncols=len(named), **place)
        # of what it shows, so that a test can tell an old picture; pixels depend on matplotlib
        shows = {"Description": hashlib.sha256(repr(panels).encode()).hexdigest()}
        data = io.BytesIO()
        figure.savefig(data, dpi=100, format="png", metadata=shows)
        write(path, data.getvalue())
        plt.close(figure)


def draw_panel(axes, panel: Panel, heads: list[tuple[int, str]]) -> None:
    """The dots, their means, and lines for LoRA and the base model; a tick for each of `heads`."""
    axes.grid(axis="y", color="#e8e8e8", lw=0.8)
    axes.set_axisbelow(True)
    for by, of_k in panel.dots.items():
        label, colour, marker, side = WAYS[by]
        edge = {"mec": colour, "mew": 1.3} if marker == "x" else {"mec": "white", "mew": 0.5}
        for k, scores in of_k.items():
            x = heads.index(k) + 0.22 * side
            if len(scores) > 1:
                axes.plot([x - 0.1, x + 0.1], [mean(scores)] * 2, color=colour, lw=1.6)
            dots = [x] * len(scores), scores, marker
            axes.plot(*dots, color=colour, ms=5, alpha=0.75, label=label, **edge)
    for name, value, dashes in (("LoRA", panel.lora, (6, 2)), ("base model", panel.base, (1, 2))):
        if value is not None:
            axes.axhline(value, color="#555555", lw=1.2, dashes=dashes, label=name, zorder=1)
    axes.set_xticks(range(len(heads)), [f"{n}\n{k.replace('%', ' %')}" for n, k in heads])
    axes.set_xlim(-0.5, len(heads) - 0.5)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    models = ["weights/smollm2-135m-instruct", "weights/gemma-3-270m"]
    arg("--out", type=Path, required=True, help="the PNG to write")
    arg("--model", nargs="+", default=models)
    arg("--task", nargs="+", default=["mquake", "clutrr", "truthfulqa"])
    arg("--data", default="data/real")
    arg("--dtype", default="float32")
    arg("--records", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    records, panels = Records(args.records), {}
    for model in args.model:
        for task in args.task:
            panels[model, task] = read_panel(records, model, task, args.data, args.dtype)
    draw(panels, args.out)
    print(f"-> {args.out}")


if __name__ == "__main__":
    errors.run(main)
