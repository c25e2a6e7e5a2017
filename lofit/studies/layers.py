"""Where do the chosen heads sit, and do two seeds, or two tasks, choose the same?

    python -m lofit.studies.layers --model weights/mini-llama --heads 10%

Only selections are run; those of the other studies in the same --out are used again.
"""

import argparse
import itertools
from collections import Counter
from pathlib import Path

import torch

from lofit import errors
from lofit.heads import rank_heads
from lofit.llm.files import read_json
from lofit.recipes import count_heads
from lofit.run.arguments import find_task
from lofit.run.summary import mean
from lofit.studies.cells import finish, run_cells
from lofit.studies.plan import Plan, config_of, study_parser
from lofit.studies.tables import markdown, picture, write_table

ABOUT = (
    "{k} of heads by {way}, seeds {seeds}: layers as mean and range; how many of the heads two"
    " choices share (of the same task: two seeds or folds; by chance {chance}), and the rank"
    " correlation of all heads' scores"
)
HEADER = ["model", "task", "mean layer", "layers", "beside", "shared", "correlation"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.add_argument("--heads", default="10%")
    parser.add_argument("--by", default="scales")
    return parser.parse_args(argv)


def agreement(one: torch.Tensor, two: torch.Tensor, k: int) -> tuple[float, float]:
    """(share of the best k heads in common, Spearman's correlation) of scores [layer, head]."""
    shared = len({*rank_heads(one, k)} & {*rank_heads(two, k)}) / k
    ranks = torch.stack([s.flatten().double().argsort().argsort().double() for s in (one, two)])
    return shared, torch.corrcoef(ranks)[0, 1].item()


def rows_of(model: str, k: int, scores: dict[str, list[torch.Tensor]]) -> list[dict]:
    """A row for each pair of tasks, with themselves too. scores: of every seed and fold."""
    rows = []
    for task, other in itertools.product(scores, scores):
        pairs = list(itertools.product(scores[task], scores[other]))
        if task == other:
            pairs = list(itertools.combinations(scores[task], 2))
        layers = [layer for s in scores[task] for layer, _ in rank_heads(s, k)]
        found = [agreement(*pair, k) for pair in pairs]
        row = {"model": Path(model).name, "task": task, "beside": other, "k": k}
        row |= {"mean_layer": mean(layers), "layers": dict(sorted(Counter(layers).items()))}
        row |= {"pairs": len(pairs), "chance": k / scores[task][0].numel()}
        row["shared"] = mean([s for s, _ in found]) if found else None
        rows.append(row | {"correlation": mean([c for _, c in found]) if found else None})
    return rows


def as_text(row: dict) -> list[str]:
    layers = [int(layer) for layer in row["layers"]]
    numbers = [row["shared"], row["correlation"]]
    shared, correlation = ("–" if n is None else f"{n:.2f}" for n in numbers)
    where = [f"{row['mean_layer']:.1f}", f"{min(layers)} to {max(layers)}"]
    beside = "itself" if row["beside"] == row["task"] else row["beside"]
    return [row["model"], row["task"], *where, beside, shared, correlation]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan, chosen = Plan(args), {}
    for settings in plan.settings():
        cells = [plan.selection(setting, args.by) for setting in settings]
        chosen.setdefault(settings[0].model, {})[settings[0]] = cells
        plan.cells += cells
    failed = run_cells(plan.cells, args.jobs, args.device)
    rows, panels = [], {}
    for model, by_task in chosen.items():
        scores = {}
        for setting, cells in by_task.items():
            files = [c.steps[0].folder / f for c in cells if c.done() for f in c.steps[0].files]
            if files:
                name = find_task(setting.task)[0]
                scores[name] = [torch.tensor(read_json(f)["scores"]) for f in files]
        config = config_of(next(iter(by_task)))
        rows += rows_of(model, count_heads(args.heads, config), scores)
        panels[Path(model).name] = {
            row["task"]: [
                (str(i), row["layers"].get(i, 0) / len(scores[row["task"]]), None, None)
                for i in range(config.num_hidden_layers)
            ]
            for row in rows
            if row["model"] == Path(model).name
        }
    about = ABOUT.format(
        k=args.heads, way=args.by, seeds=" ".join(map(str, args.seeds)), chance=args.heads
    )
    write_table(args.out, "layers", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    picture(args.out / "layers.png", panels, "layer", "chosen heads")
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
