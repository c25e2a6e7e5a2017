"""How often the studies' 95 % intervals hold the truth, in simulated studies.

python tests/measure/interval_coverage.py --records docs/results

Each study compares two methods, or a method with the base model, on items that share units as the
recorded ones do: MQuAKE's 864 items edits, CLUTRR's 450 stories chains of relations, TruthfulQA's
817 questions categories (or on 864 single items). Whether a run is right on an item depends on unit
and item, on what unit and item are for this method, on the run, on what the unit and the item are
for this run: normal effects above a threshold, so that the true difference is known. Where a side
has one run, the spread of runs is borrowed from eight other cells of three.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import NormalDist

import torch

from lofit.studies.intervals import Spread, difference, run_spread

# Shares of the variance: unit, item; the same for one method; the run; unit and item for one run.
# A difference is about as alike within an edit, a chain or a category as in the recorded runs:
# most in a chain, to the cheap rule, and least in a category.
MIXES = {
    "two methods": (0.35, 0.15, 0.20, 0.06, 0.0025, 0.10, 0.1375),
    "method, base": (0.10, 0.05, 0.55, 0.04, 0.0025, 0.10, 0.1575),
    "two methods, runs of sd 10": (0.35, 0.15, 0.15, 0.05, 0.0625, 0.10, 0.1375),
    "CLUTRR, two methods": (0.55, 0.10, 0.05, 0.10, 0.0025, 0.03, 0.1675),
    "CLUTRR, base": (0.10, 0.05, 0.50, 0.10, 0.0025, 0.03, 0.2175),
    "CLUTRR, rule": (0.15, 0.0, 0.75, 0.02, 0.0025, 0.03, 0.0475),
    "TruthfulQA, two methods": (0.05, 0.35, 0.03, 0.30, 0.0025, 0.01, 0.2575),
    "TruthfulQA, base": (0.05, 0.35, 0.05, 0.30, 0.0025, 0.01, 0.2375),
    "single items": (0.0, 0.50, 0.0, 0.20, 0.0025, 0.0, 0.2975),
}
LEVELS = (-0.05, -0.2)  # of the two methods, in standard deviations from the threshold
LEVEL_OF_BASE = -1.5


class Study:
    """One simulated benchmark: what units and items are, the same for all methods."""

    def __init__(self, mix: tuple[float, ...], groups: torch.Tensor, generator: torch.Generator):
        self.sd, self.groups, self.generator = [share**0.5 for share in mix], groups, generator
        self.shared = self._of_units(self.sd[0]) + self._of_items(self.sd[1])

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def _of_units(self, sd: float) -> torch.Tensor:
        return sd * self._draw(int(self.groups.max()) + 1)[self.groups]

    def _of_items(self, sd: float) -> torch.Tensor:
        return sd * self._draw(len(self.groups))

    def runs(self, level: float, n: int) -> torch.Tensor:
        """Whether n runs of a new method are right: [run, item]."""
        _, _, unit, item, run, unit_run, item_run = self.sd
        method = level + self.shared + self._of_units(unit) + self._of_items(item)
        found = [
            method + run * self._draw(1) + self._of_units(unit_run) + self._of_items(item_run)
            for _ in range(n)
        ]
        return (torch.stack(found) > 0).double()

    def borrowed(self) -> Spread:
        return run_spread([(self.runs(LEVELS[0], 3), self.groups) for _ in range(8)])


def covered(
    mix: tuple[float, ...], n: int, groups: torch.Tensor, seed: int, lends: bool, of_base: bool
) -> list[tuple[bool, float]]:
    """Of one study: (whether the interval holds the truth, its width) by item, and by unit."""
    study = Study(mix, groups, torch.Generator().manual_seed(seed))
    ones = study.runs(LEVELS[0], n)
    if of_base:  # one run that does not vary: what it is right on is part of the truth
        others, level = study.runs(LEVEL_OF_BASE, 1), LEVEL_OF_BASE
    else:
        others, level = study.runs(LEVELS[1], n), LEVELS[1]
    chance = NormalDist(0, math.sqrt(sum(mix))).cdf
    truth = chance(LEVELS[0]) - chance(level)
    spread = study.borrowed() if lends else None
    sides = (spread, None if of_base else spread)
    both = [difference(ones, others, of, sides).interval() for of in (None, groups)]
    return [(low <= truth <= high, high - low) for low, high in both]


def units_of(folder: Path) -> dict[str, torch.Tensor]:
    """Which items of a task share a unit, as recorded with the base model's answers."""
    lines = map(json.loads, (folder / "smollm2-135m-instruct.jsonl").open())
    return {x["task"]: torch.tensor(x["clusters"]) for x in lines if "clusters" in x}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=Path("docs/results"))
    parser.add_argument("--studies", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    units = units_of(args.records)
    print(f"{args.studies} studies each: % of intervals that hold the truth, mean width in points")
    for name, mix in MIXES.items():
        groups = units.get(name.partition(",")[0].lower(), units["mquake"])
        groups = torch.arange(len(groups)) if name == "single items" else groups
        for n, lends in ((1, False), (1, True), (3, False), (5, False)):
            of_base = name.endswith(("base", "rule"))
            found = [covered(mix, n, groups, i, lends, of_base) for i in range(args.studies)]
            cells = []
            for way, results in zip(("by item", "by unit"), zip(*found, strict=True), strict=True):
                share = 100 * sum(hit for hit, _ in results) / len(results)
                width = 100 * sum(width for _, width in results) / len(results)
                cells.append(f"{way} {share:5.1f} ({width:4.1f})")
            runs = f"{n} run{'s' * (n > 1)}{', spread borrowed' * lends}"
            print(f"{name:27} {runs:23} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
