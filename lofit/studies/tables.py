"""What a study reads off its cells: scores of items, their means with intervals, and tables."""

from pathlib import Path

from lofit.files import read_jsonl, write_json, write_text
from lofit.summary import mean, paired_bootstrap


def items(run: Path, metric: str) -> tuple[list[float], list[float]]:
    """(base, tuned) scores of every item of a run, of both folds where it has folds."""
    files = sorted(run.glob("fold*/predictions.jsonl")) or [run / "predictions.jsonl"]
    lines = [line for file in files for _, line in read_jsonl(file)]
    return [line["base"][metric] for line in lines], [line["tuned"][metric] for line in lines]


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


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(folder: Path, name: str, about: str, table: str, found: list[dict]) -> None:
    """Print the table; write NAME.md and NAME.json (the rows as numbers) to the folder."""
    write_json(folder / f"{name}.json", {"about": about, "rows": found})
    write_text(folder / f"{name}.md", f"{about}\n\n{table}\n")
    print(f"\n{about}\n\n{table}\n\n-> {folder / name}.json, {name}.md")
