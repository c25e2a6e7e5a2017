"""What a person looks at: the map of heads, results with confidence intervals, their table."""

import torch

from lofit.files import Write
from lofit.heads import Head

SHADES = " .:-=+*"


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


def head_picture(scores: torch.Tensor, heads: list[Head], title: str, label: str) -> Write | None:
    """The same as a PNG, `label` beside its colours, for `write_atomic`; None where matplotlib is
    not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        figsize=(2 + 0.25 * scores.shape[1], 1.5 + 0.25 * scores.shape[0]), layout="constrained"
    )
    image = axes.imshow(scores.numpy(), origin="lower", cmap="Blues")
    layers, columns = zip(*heads, strict=True)
    axes.scatter(columns, layers, marker="s", s=60, facecolors="none", edgecolors="crimson")
    axes.set(xlabel="head", ylabel="layer", title=title)
    figure.colorbar(image, label=label)
    plt.close(figure)
    return lambda path: figure.savefig(path, dpi=120, format="png")


def paired_bootstrap(
    base: list[float], tuned: list[float], seed: int = 0, draws: int = 10_000
) -> tuple[float, float]:
    """95 % percentile interval of mean(tuned - base), resampling the items in pairs."""
    difference = torch.tensor(tuned, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(difference)
    at_once = max(1, 10**6 // n)  # resamples, so that they take little memory
    means = [
        difference[torch.randint(n, (min(at_once, draws - done), n), generator=generator)].mean(1)
        for done in range(0, draws, at_once)
    ]
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(means).quantile(bounds).tolist()
    return low, high


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def results_table(results: dict) -> str:
    """The `metrics` of results.json as a table, in percent."""
    lines = [f"{'':14}{'base':>9}{'tuned':>9}   difference [95 % interval]"]
    for metric, base in results["base"].items():
        if "tuned" not in results:
            lines.append(f"{metric:14}{base:9.1%}")
            continue
        change = results["difference"][metric]
        low, high = (100 * bound for bound in change["ci95"])
        lines.append(
            f"{metric:14}{base:9.1%}{results['tuned'][metric]:9.1%}"
            f"   {100 * change['value']:+.1f} [{low:+.1f}, {high:+.1f}]"
        )
    return "\n".join(lines)


def summarize(
    about: dict, told: dict[str, dict], scored: dict[str, list[dict]], metrics: tuple[str, ...]
) -> dict:
    """results.json: `about` and the means of the base model; of the tuned one what is told of it,
    its means, differences and intervals. Several tuned ones stand by label under "adapters"."""
    columns = {
        who: {metric: [row[metric] for row in rows] for metric in metrics}
        for who, rows in scored.items()
    }
    means = {who: {metric: mean(c[metric]) for metric in metrics} for who, c in columns.items()}
    adapters = {}
    for who in told:
        difference = {
            metric: {
                "value": means[who][metric] - means["base"][metric],
                "ci95": paired_bootstrap(columns["base"][metric], columns[who][metric]),
            }
            for metric in metrics
        }
        adapters[who] = told[who] | {"tuned": means[who], "difference": difference}
    found = about | {"base": means["base"]}
    return found | (adapters.get("tuned") or ({"adapters": adapters} if adapters else {}))


def print_results(title: str, results: dict) -> None:
    """The table of each set of offsets, or of the base model alone."""
    for label, own in (results.get("adapters") or {"": {}}).items():
        part = results | own
        what = part.get("method") or f"{len(part['heads'])} heads"
        print(
            f"\n{title}, {f'{label}, ' if label else ''}{what},"
            f" {part['trained_values']:,} trained values ({part['share_of_base']:.4%} of the base"
            f" model), seed {part['seed']}\n{results_table(part)}"
        )
