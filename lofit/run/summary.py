"""What a person looks at: the map of heads, results with confidence intervals, their table."""

import io
import re
from collections import Counter
from pathlib import Path

import torch

from lofit.files import write
from lofit.heads import Head
from lofit.tasks import Example, Task, first_option, last_number

SHADES = " .:-=+*"
FEW = 20  # a task with at most so many different answers can be met by always saying one


def head_map(scores: torch.Tensor, heads: list[Head]) -> str:
    """Layers (rows, the last on top) x heads (columns) as text; `#` marks the chosen heads, the
    others are shaded by score. scores: [layer, head]."""
    top = scores.max().clamp(min=1e-12)
    chosen = set(heads)
    lines = []
    for layer in reversed(range(scores.shape[0])):
        shades = (scores[layer] / top * (len(SHADES) - 1)).int().tolist()
        cells = ("#" if (layer, h) in chosen else SHADES[s] for h, s in enumerate(shades))
        n = sum(in_layer == layer for in_layer, _ in heads)
        lines.append(f"layer {layer:3} |{' '.join(cells)}| {n or ''}".rstrip())
    return "\n".join([*lines, f"          head 0 .. {scores.shape[1] - 1}    # = chosen"])


def save_picture(path: Path, scores: torch.Tensor, heads: list[Head], title: str) -> str:
    """The same as a PNG; returns what to print of it. Where matplotlib is not installed nothing is
    left, so that no old picture stands beside new heads."""
    try:
        import matplotlib
    except ImportError:
        path.unlink(missing_ok=True)
        return ""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        figsize=(2 + 0.25 * scores.shape[1], 1.5 + 0.25 * scores.shape[0]), layout="constrained"
    )
    image = axes.imshow(scores.numpy(), origin="lower", cmap="Blues")
    layers, columns = zip(*heads, strict=True)
    axes.scatter(columns, layers, marker="s", s=60, facecolors="none", edgecolors="crimson")
    axes.set(xlabel="head", ylabel="layer", title=title)
    figure.colorbar(image, label="score")
    data = io.BytesIO()
    figure.savefig(data, dpi=120, format="png")
    plt.close(figure)
    write(path, data.getvalue())
    return f", {path.name}"


def paired_bootstrap(
    base: list[float], tuned: list[float], units: list[str] | None = None, seed: int = 0,
    draws: int = 10_000,
) -> tuple[float, float]:  # fmt: skip
    """95 % percentile interval of mean(tuned - base), resampling the items in pairs. units: what
    items share; they are then drawn by unit, for answers about the same edit rise and fall
    together. One unit for all says nothing of how units vary: then items are drawn."""
    difference = torch.tensor(tuned, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    of_each = units if units and len(set(units)) > 1 else range(len(difference))
    names = {unit: i for i, unit in enumerate(dict.fromkeys(of_each))}
    unit = torch.tensor([names[u] for u in of_each])
    sums, sizes = (
        torch.zeros(len(names), dtype=torch.float64).index_add(0, unit, values)
        for values in (difference, torch.ones_like(difference))
    )
    generator = torch.Generator().manual_seed(seed)
    n = len(sums)
    at_once = max(1, 10**6 // n)  # resamples, so that they take little memory
    means = []
    for done in range(0, draws, at_once):
        drawn = torch.randint(n, (min(at_once, draws - done), n), generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(means).quantile(bounds).tolist()
    return low, high


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summarize(
    scored: dict[str, list[dict]], metrics: tuple[str, ...], units: list[str] | None = None
) -> dict:
    """scored: the rows of "base" and of each set of offsets by its label -> {"scores": the means of
    each, "differences": of each from the base, with their intervals}."""
    columns = {
        who: {metric: [row[metric] for row in rows] for metric in metrics}
        for who, rows in scored.items()
    }
    scores = {who: {metric: mean(c[metric]) for metric in metrics} for who, c in columns.items()}
    differences = {
        who: {
            metric: {
                "value": scores[who][metric] - scores["base"][metric],
                "ci95": paired_bootstrap(columns["base"][metric], columns[who][metric], units),
            }
            for metric in metrics
        }
        for who in scored
        if who != "base"
    }
    return {"scores": scores, "differences": differences}


def results_table(results: dict) -> str:
    """What `summarize` gives, as a table in percent: a column for each model, and how far each set
    of offsets is from the base."""
    whos = list(results["scores"])
    width = max(9, *(len(who) + 2 for who in whos))
    lines = [f"{'':14}" + "".join(f"{who:>{width}}" for who in whos)]
    lines[0] += "   difference [95 % interval]" if len(whos) > 1 else ""
    for metric in results["scores"]["base"]:
        line = f"{metric:14}"
        line += "".join(f"{results['scores'][who][metric]:{width}.1%}" for who in whos)
        for who in whos[1:]:
            change = results["differences"][who][metric]
            low, high = (100 * bound for bound in change["ci95"])
            line += f"   {100 * change['value']:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(line)
    return "\n".join(lines)


def by_answer(task: Task, examples: list[Example], scored: dict[str, list[dict]]) -> dict:
    """How often each answer was given, and what always the most frequent right one would score:
    {"always": {"answer", "share"}, "given": {who: {answer: n}}}; n of other texts as "other". Empty
    where the answers and options are more than FEW."""
    right = Counter(_right(e) for e in examples)
    answers = sorted(set(right) | {w.strip() for e in examples for w in e.wrong})
    if len(answers) > FEW:
        return {}
    folded = {answer.lower(): answer for answer in answers}
    given = {}
    for who, rows in scored.items():
        texts = [_given(task, e, row) for e, row in zip(examples, rows, strict=True)]
        counts = Counter(t if t in answers else folded.get(t.lower(), "other") for t in texts)
        given[who] = {answer: counts[answer] for answer in (*answers, "other")}
    ((answer, n),) = right.most_common(1)
    return {"always": {"answer": answer, "share": n / len(examples)}, "given": given}


def _right(example: Example) -> str:
    return example.answer.strip() if example.value is None else f"{example.value:.15g}"


def _given(task: Task, example: Example, row: dict) -> str:
    """What one item was answered with: the option, number or text generated, or the most probable
    option."""
    options = (*example.right, *example.wrong)
    if "prediction" not in row:
        log_probs = [*row["log_probs"]["right"], *row["log_probs"]["wrong"]]
        return options[log_probs.index(max(log_probs))].strip()
    if options:
        return first_option(row["prediction"], options, task.whole_words) or ""
    if example.value is None:
        return row["prediction"].strip()
    number = last_number(row["prediction"])
    return "" if number is None else f"{number:.15g}"


def by_rule(task: Task, examples: list[Example]) -> dict:
    """What the task's cheap rules would score: {"rules": {name: mean}, "rule_scores": {name: of
    each example}}; empty without rules. Where a rule has no answer it is wrong."""
    found: dict[str, list[float]] = {}
    for i, example in enumerate(examples):
        for name, answer in example.rules:
            scores = found.setdefault(name, [0.0] * len(examples))
            scores[i] = task.score(task.extract(example, answer), example)[task.metrics[0]]
    means = {name: mean(scores) for name, scores in found.items()}
    return {"rules": means, "rule_scores": found} if found else {}


def by_group(
    examples: list[Example], scored: dict[str, list[dict]], metrics: tuple[str, ...]
) -> dict:
    """The means of each group of examples: {"groups": {group: {"n", who: {metric: mean}}}}. Empty
    where the examples have no groups."""
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group, []).append(i)
    if set(groups) <= {""}:
        return {}
    found = {
        group: {"n": len(groups[group])}
        | {
            who: {metric: mean([rows[i][metric] for i in groups[group]]) for metric in metrics}
            for who, rows in scored.items()
        }
        for group in sorted(groups, key=_natural)
    }
    return {"groups": found}


def _natural(text: str) -> list:
    """A key that sorts "depth 9" before "depth 10"."""
    return [(0, int(t), "") if t.isdecimal() else (1, 0, t) for t in re.split(r"(\d+)", text) if t]


def print_details(results: dict) -> None:
    """The lines of `by_answer`, `by_rule` and `by_group`, where there are any."""
    if "always" in results:
        always = results["always"]
        print(f"always {always['answer']!r} would score {always['share']:.1%}; answers given:")
        for who, counts in results["given"].items():
            print(f"  {who}: {', '.join(f'{a} {n}' for a, n in counts.items() if n)}")
    for name, share in results.get("rules", {}).items():
        print(f"{name} would score {share:.1%}")
    for group, means in results.get("groups", {}).items():
        firsts = {who: next(iter(m.items())) for who, m in means.items() if who != "n"}
        scores = ", ".join(f"{who} {metric} {value:.1%}" for who, (metric, value) in firsts.items())
        print(f"  {group} ({means['n']} items): {scores}")
