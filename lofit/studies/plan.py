"""What studies share: the settings that the arguments name, the cells that several runs need, and
runs whose learning rate is chosen on validation."""

import argparse
import itertools
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from lofit.artefacts import ADAPTER_CONFIG
from lofit.files import read_json
from lofit.llm.checkpoint import find_folder
from lofit.llm.config import ModelConfig
from lofit.recipes import count_heads, find_recipe
from lofit.session import find_task
from lofit.studies.cells import Cell, Setting, add_study_args
from lofit.summary import mean

OUT = "runs/studies"  # one folder for all: what one study selected or asked serves the others


def study_parser(doc: str) -> argparse.ArgumentParser:
    """The parser of a study: what all have, and the factors of the recipe's learning rate."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_study_args(parser, OUT)
    arg = parser.add_argument
    arg("--lr-factors", nargs="+", type=float, default=[0.3, 1.0, 3.0],
        help="of the recipe's offset lr, the best on validation for each run")  # fmt: skip
    for script in ("select", "train"):
        text = 'more flags of its calls, like "--epochs 5"'
        arg(f"--{script}-flags", type=shlex.split, default=[], help=text)
    return parser


class Plan:
    """The cells of a study. What several need is one cell, so that it runs once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.cells = args, []
        self._shared: dict[Path, Cell] = {}

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
        """The cell that asks the base model, and the flag by which an evaluation takes it."""
        folder = self.folder(setting, f"base-{setting.split}")
        first = replace(setting, seed=self.args.seeds[0])
        cell = self._once(folder, f"{setting.name} base", first.ask_base(folder))
        return cell, ("--base-from", str(folder))

    def selection(self, setting: Setting, by: str, *flags: str, name: str = "") -> Cell:
        """The cell that scores the heads by a way; its folder is that of its step."""
        folder = self.folder(setting, f"seed{setting.seed}", f"by-{name or by}")
        step = setting.select(folder, "--by", by, *flags, *self.args.select_flags)
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
        """A run of train.py with each of some flags, and the evaluation of the best; its cells are
        added to the study's."""
        folder = self.folder(setting, f"seed{setting.seed}", name)
        flags = (*flags, *self.args.train_flags)
        trials = Trials(setting, folder, flags, tuple(tried), tuple(needs))
        base, from_base = self.base(setting)
        title = f"{setting.name} seed {setting.seed} {name}"
        cells = [
            Cell(f"{title} {trials.folder_of(more).name}", [trials.train(more)], trials.needs)
            for more in trials.tried
        ]
        best = Cell(
            f"{title} evaluated",
            lambda: [setting.evaluate(trials.best(), *from_base)],
            (base, *cells),
        )
        self.cells += [*cells, best]
        return trials

    def lofit(
        self, setting: Setting, name: str, k: str, selected: Cell | None, extra: tuple = ()
    ) -> "Trials":
        """Offsets on the best K heads of a selection, or on all, at each learning rate; extra: more
        flags of train.py."""
        lrs = offset_lrs(setting, k, self.args.lr_factors)
        flags, needs = ("--heads", "all"), ()
        if selected is not None:
            flags = ("--heads", str(selected.steps[0].folder), "--top", k)
            needs = (selected,)
        tried = [("--lr", lr) for lr in lrs]
        return self.trials(setting, name, (*flags, *extra), tried, needs)


@dataclass(frozen=True)
class Trials:
    """A run in several folders, one for each of the flags tried."""

    setting: Setting
    folder: Path
    flags: tuple[str, ...]
    tried: tuple[tuple[str, ...], ...]
    needs: tuple[Cell, ...] = ()

    def folder_of(self, more: tuple[str, ...]) -> Path:
        return self.folder / ("".join(more).replace("--", "") or "recipe")

    def train(self, more: tuple[str, ...]):
        return self.setting.train(self.folder_of(more), *self.flags, *more)

    def best(self) -> Path | None:
        """The folder of the best score on validation (the earlier of equal ones); None before all
        are done."""
        folders = [self.folder_of(more) for more in self.tried]
        if not all(self.train(more).done() for more in self.tried):
            return None
        metric = find_task(self.setting.task)[1].MAIN_METRIC
        return max(folders, key=lambda folder: validation(folder, metric))

    def results(self) -> Path:
        """The best one's folder where it is evaluated; else one that is not there."""
        best = self.best()
        return self.folder / "not-there" if best is None else best

    def seconds(self) -> float:
        """Of the selection, if any, and of the best training."""
        best = self.results().name
        train = sum(self.train(m).seconds() for m in self.tried if self.folder_of(m).name == best)
        return train + sum(step.seconds() for cell in self.needs for step in cell.steps)


def validation(run: Path, metric: str) -> float:
    """The validation score that train.py wrote of its offsets; the mean over folds."""
    files = sorted(run.glob(f"fold*/{ADAPTER_CONFIG}")) or [run / ADAPTER_CONFIG]
    return mean([read_json(file)["val"][metric] for file in files])


def config_of(setting: Setting) -> ModelConfig:
    return ModelConfig.from_file(
        find_folder(setting.model, wanted=("config.json",)) / "config.json"
    )


def offset_lrs(setting: Setting, k: str, factors: list[float]) -> list[str]:
    """The recipe's learning rate for K heads ("all", a number, a share) times each factor."""
    config = config_of(setting)
    total = config.num_hidden_layers * config.num_attention_heads
    n = total if k == "all" else count_heads(k, config)
    lr = find_recipe(config, find_task(setting.task)[0])[1].lr_of(n, total)
    return [f"{lr * factor:.3g}" for factor in factors]
