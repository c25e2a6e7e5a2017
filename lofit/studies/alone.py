"""Every head of a model, trained alone: what each can do, beside what a way of choosing says of it.

    python -m lofit.studies.alone                         # the tables
    python -m lofit.studies.alone --out docs/alone.png    # and both maps

The runs are in docs/results/alone; tests/measure/single_heads.py makes them. Correlations are of
ranks (Spearman's), over the heads that were run, mean of the seeds.
"""

import argparse
import io
from pathlib import Path

import torch

from lofit import errors
from lofit.errors import InputError
from lofit.files import read_jsonl, write
from lofit.run.summary import mean
from lofit.studies.records import Records
from lofit.studies.tables import markdown, spearman

WAYS = ("scales", "gradient", "probe")


def read_map(path: Path, task: str, layers: int, heads: int) -> tuple[torch.Tensor, float | None]:
    """([layer, head] the score of each head trained alone, nan where it was not run; the base
    model's)."""
    found, base, ways = torch.full((layers, heads), float("nan")), None, set()
    for _, line in read_jsonl(path):
        if line["task"] == task:
            keys = ("model", "data_hash", "seed", "dtype", "epochs", "lr")
            ways.add(tuple(line[key] for key in keys))
            if line["head"]:
                found[tuple(line["head"])] = line["score"]
            else:
                base = line["score"]
    if len(ways) > 1:
        raise InputError(
            f"{path}: {task}: heads trained in {len(ways)} ways; keep the lines of one"
        )
    return found, base


def layer_rows(alone: torch.Tensor) -> list[list[str]]:
    known = [row[~row.isnan()] for row in alone]
    return [
        [str(layer), str(len(row)), *(f"{100 * v:.1f}" for v in (row.mean(), row.min(), row.max()))]
        for layer, row in enumerate(known)
        if len(row)
    ]


def share_of_layers(alone: torch.Tensor) -> float:
    """How much of the variance between heads goes with their layers: adjusted R squared, which is 0
    in the mean where layers do not matter, however few heads each has."""
    known = ~alone.isnan()
    inside = (alone - alone.nanmean(1, keepdim=True))[known].square().sum()
    return float(1 - inside / (known.sum() - known.any(1).sum()) / alone[known].var())


def tells_layers(alone: torch.Tensor) -> bool:
    """Whether two heads of each layer were run. With one of each a layer and its head are one."""
    return bool((~alone.isnan()).sum(1).min() > 1)


def way_rows(alone: torch.Tensor, grids: dict[str, list[torch.Tensor]]) -> list[list[str]]:
    """A row for each way of choosing, and one for the layer alone where that can be told."""
    known = ~alone.isnan()
    # a head is predicted by the other heads of its layer, not by itself
    count = known.sum(1, keepdim=True) - 1
    others = (alone.nansum(1, keepdim=True) - alone) / count
    rows, inner = [], alone - alone.nanmean(1, keepdim=True)
    layers = {"layer alone": [others]} if tells_layers(alone) else {}
    for way, found in {**grids, **layers}.items():
        within = [g - torch.where(known, g, torch.nan).nanmean(1, keepdim=True) for g in found]
        over_all = mean([spearman(g[known], alone[known]) for g in found])
        inside = mean([spearman(g[known], inner[known]) for g in within])
        best = [alone[known][g[known].argmax()] for g in found]
        first = [int((alone[known] > score).sum()) + 1 for score in best]
        rows.append([way, f"{over_all:.2f}", f"{inside:.2f}", " ".join(map(str, first))])
        if way in layers:
            rows[-1][2:] = ["–", "–"]
        elif not layers:
            rows[-1][2] = "–"
    return rows


def picture(alone: torch.Tensor, learned: torch.Tensor, title: str) -> bytes:
    """Both maps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    names = (f"{title}: each head trained alone, % right", "what step 1 learns: norm of its scale")
    for axes, values, name in zip(both, (100 * alone, learned), names, strict=True):
        image = axes.imshow(values.numpy(), origin="lower", cmap="Blues")
        axes.set(xlabel="head", ylabel="layer", title=name)
        figure.colorbar(image, shrink=0.8)
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png")
    plt.close(figure)
    return data.getvalue()


def tables(args: argparse.Namespace) -> tuple[str, torch.Tensor, torch.Tensor]:
    """(the text under the command, the map, what step 1 learned) of parsed arguments."""
    # the selections with the recipe's settings: one of each seed
    chosen = {way: [] for way in WAYS}
    for title, (grid, *_) in Records(args.records).grids(args.model).items():
        _, task, *_, way = title.split()
        if task == args.task and way in WAYS:
            chosen[way].append(torch.tensor(grid))
    chosen = {way: found for way, found in chosen.items() if found}
    path = args.records / "alone" / f"{Path(args.model).name}.jsonl"
    if "scales" not in chosen:
        raise InputError(
            f"{args.records}: no selection of {args.model} for {args.task} is recorded"
        )
    alone, base = read_map(path, args.task, *chosen["scales"][0].shape)
    if base is None:
        raise InputError(f"{path}: no {args.task} in it; tests/measure/single_heads.py makes it")
    n, of = int((~alone.isnan()).sum()), alone.numel()
    about = (
        "The rank correlation of a way's scores with this map; the same when the mean of its\n"
        "layer is taken from each head; and the place in this map of the head that each seed ranks"
        " first,\nof those that were run."
    )
    if tells_layers(alone):
        shares = (f"{share_of_layers(part):.0%}" for part in (alone, alone[1:]))
        about = (
            "Of the variance between heads {} goes with the layer, without layer 0 {} (adjusted R"
            " squared).\n".format(*shares)
        ) + about
    header = ["scored by", "rank correlation", "inside a layer", "place of its first head"]
    parts = [
        f"{Path(args.model).name}, {args.task}: {n} of {of} heads, each trained alone; the base"
        f" model has {base:.1%}",
        markdown(["layer", "heads", "mean", "lowest", "highest"], layer_rows(alone)),
        about,
        markdown(header, way_rows(alone, chosen)),
    ]
    return "\n\n".join(parts), alone, chosen["scales"][0]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--model", default="weights/mini-llama", help="(default: %(default)s)")
    arg("--task", default="mquake", help="(default: %(default)s)")
    arg("--records", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    arg("--out", type=Path, help="a PNG of both maps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    text, alone, learned = tables(args)
    print(text)
    if args.out:
        write(args.out, picture(alone, learned, Path(args.model).name))


if __name__ == "__main__":
    errors.run(main)
