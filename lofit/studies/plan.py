"""What studies share: the settings that the arguments name, the cells that several runs need, and
runs whose learning rate is chosen on validation."""

import argparse
import itertools
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from lofit.llm.checkpoint import find_folder
from lofit.llm.config import ModelConfig
from lofit.llm.files import read_json
from lofit.recipes import count_heads, find_recipe
from lofit.run.arguments import find_task
from lofit.run.artefacts import ADAPTER_CONFIG
from lofit.run.summary import mean
from lofit.studies.cells import Cell, Setting, Step, add_study_args

OUT = "runs/studies"  # one folder for all: what one study selected, trained or asked serves others
SEED = 42


def study_parser(doc: str) -> argparse.ArgumentParser:
    """The parser of a study: what all have, and the factors of the recipe's learning rate."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_study_args(parser, OUT)
    arg = parser.add_argument
    arg("--lr-factors", nargs="+", type=float, default=[0.3, 1.0, 3.0],
        help="of the recipe's offset lr: the first seed's best on validation")  # fmt: skip
    for script in ("select", "train"):
        text = 'more flags of its calls, like "--epochs 5"'
        arg(f"--{script}-flags", type=shlex.split, default=[], help=text)
    return parser


class Plan:
    """The cells of a study. What several need is one cell, so that it runs once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.cells = args, []
        self._shared: dict[Path, Cell] = {}
        self._tuned: dict[tuple[str, str], Trials] = {}

    def settings(self) -> list[list[Setting]]:
        """For every model and task, that of each seed."""
        a = self.args
        return [
            [Setting(model, task, a.data, seed, a.dtype, a.split) for seed in a.seeds]
            for model, task in itertools.product(a.model, a.task)
        ]

    def folder(self, setting: Setting, *names: str) -> Path:
        return self.args.out.joinpath(setting.name, *names)

    def base(self, setting: Setting) -> tuple[Cell, tuple[str, str]]:
        """The cell that asks the base model, and the flag by which an evaluation takes it. Nothing
        is drawn there: one seed serves whatever seeds a study, or a job array, has."""
        folder = self.folder(setting, f"base-{setting.split}")
        step = replace(setting, seed=SEED).ask_base(folder)
        return self._once(folder, f"{setting.name} base", step), ("--base-from", str(folder))

    def selection(self, setting: Setting, by: str, *flags: str, name: str = "") -> Cell:
        """The cell that scores the heads by a way; its folder is that of its step."""
        folder = self.folder(setting, f"seed{setting.seed}", f"by-{name or by}")
        way = () if by == "scales" else ("--by", by)
        step = setting.select(folder, *way, *flags, *self.args.select_flags)
        return self._once(folder, f"{setting.name} seed {setting.seed} by {name or by}", step)

    def _once(self, folder: Path, name: str, step) -> Cell:
        return self._shared.setdefault(folder, Cell(name, [step]))

    def trials(
        self,
        setting: Setting,
        name: str,
        flags: tuple[str, ...],
        tried: list[tuple[str, ...]],
        needs: tuple[Cell, ...] = (),
    ) -> "Trials":
        """A run of train.py with each of some flags, and the evaluation of the best; of a further
        seed of the same name only with the flags that the first one chose. Its cells are added to
        the study's."""
        folder = self.folder(setting, f"seed{setting.seed}", name)
        first = self._tuned.get((setting.name, name))
        trials = Trials(setting, folder, (*flags, *self.args.train_flags), tuple(tried), first)
        trials.needs = needs
        base, from_base = self.base(setting)
        title = f"{setting.name} seed {setting.seed} {name}"
        if first is None:
            self._tuned[setting.name, name] = trials
            trials.cells = [
                Cell(f"{title} {trials.folder_of(more).name}", [trials.train(more)], needs)
                for more in trials.tried
            ]

        def steps() -> list[Step]:
            chosen = trials.chosen()
            run = setting.evaluate(trials.folder_of(chosen), *from_base)
            return [run] if first is None else [trials.train(chosen), run]

        before = (*needs, *first.cells) if first else trials.cells
        trials.evaluated = Cell(f"{title} evaluated", steps, (base, *before))
        self.cells += [*trials.cells, trials.evaluated]
        return trials

    def lofit(
        self, setting: Setting, by: str, k: str, selected: Cell | None = None, extra: tuple = ()
    ) -> "Trials":
        """Offsets on K heads, by default the best by a way ("random" draws them; K may be "all"),
        else those of a selection, at each learning rate; extra: more flags of train.py."""
        name, flags = f"{by}-{k}", ("--heads", "random", "--top", k)
        if k == "all":
            name, flags, selected = "all", ("--heads", "all"), None
        elif by != "random":
            selected = selected or self.selection(setting, by)
            flags = ("--heads", str(selected.steps[0].folder), "--top", k)
        name += "".join(extra).replace("--", "-")
        tried = offset_lrs(setting, k, self.args.lr_factors)
        return self.trials(setting, name, (*flags, *extra), tried, (selected,) if selected else ())


@dataclass(eq=False)
class Trials:
    """A run in several folders, one for each of the flags tried."""

    setting: Setting
    folder: Path
    flags: tuple[str, ...]
    tried: tuple[tuple[str, ...], ...]
    first: "Trials | None"  # of another seed, whose choice is this one's; None: its own
    needs: tuple[Cell, ...] = ()
    cells: list[Cell] = field(default_factory=list)  # that train; of the first seed
    evaluated: Cell | None = None

    def folder_of(self, more: tuple[str, ...]) -> Path:
        return self.folder / ("".join(more).replace("--", "") or "recipe")

    def train(self, more: tuple[str, ...]) -> Step:
        return self.setting.train(self.folder_of(more), *self.flags, *more)

    def chosen(self) -> tuple[str, ...] | None:
        """The flags of the best score on validation (the earlier of equal ones); None before all
        are done."""
        if self.first is not None:
            return self.first.chosen()
        if not all(self.train(more).done() for more in self.tried):
            return None
        metric = find_task(self.setting.task)[1].MAIN_METRIC
        return max(self.tried, key=lambda more: validation(self.folder_of(more), metric))

    def results(self) -> Path:
        """The folder of the evaluated run; before, one that is not there."""
        chosen = self.chosen()
        return self.folder / "not-there" if chosen is None else self.folder_of(chosen)

    def seconds(self) -> float:
        """Of the selection, if any, and of the training with the chosen flags."""
        chosen = self.chosen()
        train = 0.0 if chosen is None else self.train(chosen).seconds()
        return train + sum(step.seconds() for cell in self.needs for step in cell.steps)


def validation(run: Path, metric: str) -> float:
    """The validation score that train.py wrote of its offsets; the mean over folds."""
    files = sorted(run.glob(f"fold*/{ADAPTER_CONFIG}")) or [run / ADAPTER_CONFIG]
    return mean([read_json(file)["val"][metric] for file in files])


def config_of(setting: Setting) -> ModelConfig:
    return ModelConfig.from_file(
        find_folder(setting.model, wanted=("config.json",)) / "config.json"
    )


def offset_lrs(setting: Setting, k: str, factors: list[float]) -> list[tuple[str, ...]]:
    """For each factor the flags that multiply the recipe's learning rate for K heads ("all", a
    number, a share); of 1 none: the recipe itself, for which no config.json is read."""
    if set(factors) == {1}:
        return [()]
    config = config_of(setting)
    total = config.num_hidden_layers * config.num_attention_heads
    n = total if k == "all" else count_heads(k, config)
    lr = find_recipe(config, find_task(setting.task)[0])[1].lr_of(n, total)
    return [() if factor == 1 else ("--lr", f"{lr * factor:.3g}") for factor in factors]
