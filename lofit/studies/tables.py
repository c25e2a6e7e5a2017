"""What a study reads off its cells: scores of items, their means with intervals, and tables."""

import shlex
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from lofit.files import read_jsonl, write_atomic, write_json, write_text
from lofit.llm.files import read_json
from lofit.run.summary import mean, paired_bootstrap

SCORES = "scores.json"


def keep_items(run: Path) -> None:
    """Write scores.json: of predictions.jsonl, of both folds where the run has folds, the scores of
    every item without a word of the data: {who: {metric: [...]}}. Such a file may be published."""
    files = sorted(run.glob("fold*/predictions.jsonl")) or [run / "predictions.jsonl"]
    lines = [line for file in files for _, line in read_jsonl(file)]
    scored = {who: lines[0][who] for who in ("base", "tuned") if who in lines[0]}
    found = {
        who: {
            metric: [int(x) if x.is_integer() else x for x in (line[who][metric] for line in lines)]
            for metric, score in row.items()
            if isinstance(score, float)
        }
        for who, row in scored.items()
    }
    write_json(run / SCORES, found)


def items(run: Path, metric: str) -> tuple[list[float], list[float]]:
    """(base, tuned) scores of every item of a run."""
    found = read_json(run / SCORES)
    return found["base"][metric], found["tuned"][metric]


def summary(runs: list[Path], metric: str) -> dict | None:
    """Several runs of one kind (seeds, draws): the score of each, their mean, its gain over the
    base, and the 95 % interval of that gain over the items, each item's score being the mean over
    the runs. None if no run is done."""
    runs = [run for run in runs if (run / "results.json").exists()]
    if not runs:
        return None
    base, tuned = _mean_items(runs, metric)
    scores = [mean(items(run, metric)[1]) for run in runs]
    gain = {"gain": mean(tuned) - mean(base), "ci95": paired_bootstrap(base, tuned)}
    return {"base": mean(base), "scores": scores, "mean": mean(scores)} | gain


def compare(runs: list[Path], others: list[Path], metric: str) -> dict | None:
    """Mean score of `runs` less that of `others`, with its 95 % interval over the items."""
    runs, others = ([r for r in part if (r / "results.json").exists()] for part in (runs, others))
    if not runs or not others:
        return None
    one, two = _mean_items(others, metric)[1], _mean_items(runs, metric)[1]
    return {"difference": mean(two) - mean(one), "ci95": paired_bootstrap(one, two)}


def _mean_items(runs: list[Path], metric: str) -> tuple[list[float], list[float]]:
    columns = [items(run, metric) for run in runs]
    base, tuned = zip(*columns, strict=True)
    return base[0], [mean(list(scores)) for scores in zip(*tuned, strict=True)]


def cell(found: dict | None) -> str:
    """`summary` as "84.3% (+62.8 [+58.5, +67.1]): 85.8 85.0 82.2"."""
    if found is None:
        return "–"
    each = " ".join(f"{100 * score:.1f}" for score in found["scores"])
    return f"{found['mean']:.1%} ({points(found['gain'], found['ci95'])}): {each}"


def points(value: float, ci95: tuple[float, float]) -> str:
    """ "+62.8 [+58.5, +67.1]", in percentage points."""
    low, high = ci95
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def spread_of(scores: list[float]) -> float | None:
    """Standard deviation of several runs' scores; None of one."""
    return statistics.stdev(scores) if len(scores) > 1 else None


def chosen_flags(runs: list[Path]) -> list[str]:
    """What was chosen on validation for each run that is done: its folder's name."""
    return [run.name for run in runs if (run / "results.json").exists()]


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(
    folder: Path, name: str, about: str, table: str, found: list[dict], argv: list[str] | None
) -> None:
    """Print the table; write NAME.md and NAME.json (the rows as numbers) to the folder, with the
    command that makes them."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", f"lofit.studies.{name}", *argv])
    write_json(folder / f"{name}.json", {"command": command, "about": about, "rows": found})
    write_text(folder / f"{name}.md", f"```\n{command}\n```\n\n{about}:\n\n{table}\n")
    print(f"\n{about}:\n\n{table}\n\n-> {folder / name}.json, {name}.md")


Line = list[tuple[str, float, float | None, float | None]]  # x, y, and y's interval


def lines_of(rows: list[dict], x: str, line: str) -> dict[str, dict[str, Line]]:
    """Rows with a `summary` under "score" -> a panel for each model and task: lines by label."""
    panels: dict[str, dict[str, Line]] = {}
    for row in rows:
        panel = panels.setdefault(f"{row['model']}, {row['task']}", {})
        score = row["score"]
        low, high = (score["base"] + bound for bound in score["ci95"])
        panel.setdefault(str(row[line]), []).append((str(row[x]), score["mean"], low, high))
    return panels


def picture(
    path: Path, panels: dict[str, dict[str, Line]], xlabel: str, ylabel: str, joined: bool = True
) -> bool:
    """Lines with their intervals as a PNG, or points, where x has no order (joined=False); False
    (and no file) where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    if not panels:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (6 * len(panels), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points_ in lines.items():
            xs, ys, lows, highs = zip(*points_, strict=True)
            style = "-" if joined else ""
            (drawn,) = ax.plot(xs, ys, marker="o", linestyle=style, label=label)
            if None not in lows and joined:
                ax.fill_between(xs, lows, highs, alpha=0.15, color=drawn.get_color())
            elif None not in lows:
                ax.vlines(xs, lows, highs, color=drawn.get_color())
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.legend(fontsize="small")
    write_atomic(path, lambda p: figure.savefig(p, dpi=120, format="png"))
    plt.close(figure)
    return True
