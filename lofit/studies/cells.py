"""The cells of a study: which run one is, and the shell line that makes it.

What a line leaves (heads, offsets, answers) lies in a folder of its own under runs/studies. Where a
record is there and the files that another run needs are not, as in a clone, the line makes them
again, and the record stays.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lofit.files import write_json
from lofit.llm.config import ModelConfig
from lofit.llm.hub import find_folder
from lofit.llm.model import CausalLM
from lofit.recipes import count_heads, find_recipe
from lofit.run.files import HEADS, OFFSETS, RESULTS
from lofit.run.summary import mean
from lofit.studies.records import BASE_RESULTS, CELL, SCRIPTS, TEXT_LOSS, Records, Run
from lofit.tasks import find_tasks, main_metric

WORK = Path("runs/studies")
FIXED = ("random", "all")  # heads that need no selection
GONE = ("gates", "spread", "offsets")  # ways of choosing that are recorded and cannot run


@dataclass(frozen=True)
class Pick:
    """For each seed the run that did best on validation with the first seed, of those tried; as it
    is (kind "train"), or tested on another task or text. task: what it is trained on, where
    another task's validation chose."""

    tried: tuple[Run, ...]
    seeds: tuple[int, ...]
    kind: str = "train"
    tested: str = ""
    task: str = ""

    def runs(self, records: Records) -> list[Run]:
        """One a seed, none before all that is tried is recorded. Of equal scores the first wins."""
        best = self.tried[0]
        if len(self.tried) > 1:
            if not all(records.done(run, "train.py") for run in self.tried):
                return []
            best = max(self.tried, key=lambda run: validation(records, run))
        best = replace(best, task=self.task or best.task, kind=self.kind, tested=self.tested)
        return [replace(best, seed=seed) for seed in self.seeds]

    def missing(self, records: Records) -> list[tuple[Run, str]]:
        """(run, the last file that it is to make) of what is not recorded, as far as the records
        say which runs these are."""
        runs = self.runs(records)
        cells = [] if runs else [(run, OFFSETS) for run in self.tried]
        last = {"select": HEADS, "text": TEXT_LOSS}.get(self.kind, RESULTS)
        for run in runs:
            cells += [(run.base, BASE_RESULTS)] if last == RESULTS else []
            cells.append((run, last))
        return [(run, file) for run, file in cells if not records.done(run, SCRIPTS[file])]


def validation(records: Records, run: Run) -> float:
    """The score that train.py recorded; of a task in folds their mean."""
    found, metric = records.of(run)["val"], main_metric(run.task)
    return mean([val[metric] for val in (found if isinstance(found, list) else [found])])


def missing_lines(picks: Iterable[Pick], records: Records) -> Iterable[str]:
    """A shell line for each cell that can be made now. One that needs what an earlier line makes is
    left for the next time: two that ran at once would make it twice."""
    cells = dict.fromkeys(cell for pick in picks for cell in pick.missing(records))
    making: set[Path] = set()
    for run, last in cells:
        steps = [step for step in steps_to(run, last) if not step.file.exists()]
        files = {step.file for step in steps}
        if run.by not in GONE and not making & files:
            making |= files
            yield line_of(run, steps, records)


@dataclass(frozen=True)
class Step:
    """A call of a script for a run, and the file that it leaves."""

    run: Run
    file: Path
    command: str


def line_of(run: Run, steps: list[Step], records: Records) -> str:
    """The steps, each left out if its file is there when the line is repeated, and the record of
    what they make."""
    made = dict.fromkeys(s.run for s in steps if not records.done(s.run, SCRIPTS[s.file.name]))
    made = {each: folder_of(each) for each in (*made, run)}  # the run itself once, and last
    for each, folder in made.items():
        write_json(folder / CELL, each.as_dict())
    record = ["python", "-m", "lofit.studies.records", *map(str, made.values())]
    if records.folder != Path("docs/results"):
        record += ["--records", str(records.folder)]
    tests = [f"(test -e {shlex.quote(str(s.file))} || {s.command})" for s in steps]
    return " && ".join([*tests, shlex.join(record)])


def folder_of(run: Run) -> Path:
    named = ("select", "heads_of")  # their values could be another field's
    values = {k: v for k, v in run.as_dict().items() if k not in ("model", "task")}
    names = [f"{k} {v}" if k in named else str(v) for k, v in values.items()]
    parts = (run.model, run.task, "_".join(names))
    return WORK.joinpath(*(re.sub(r"[^\w.%]+", "-", part) for part in parts))


def steps_to(run: Run, last: str) -> list[Step]:
    """All calls up to the one that makes a run's file of this name, with those whose files it
    reads."""
    if run.kind == "base":
        return calls(run, "eval.py", last, "--base-only")
    if run.kind == "select":
        by = [] if run.by == "scales" else ["--by", run.by]
        return calls(run, "select_heads.py", last, *by, *shlex.split(run.select))
    if run.kind == "train":
        fixed = run.method != "lofit" or run.by in FIXED
        needs = [] if fixed else steps_to(run.selection, HEADS)
        flags = training_flags(run, run.by if fixed else run.selection)
        test = calls(run, "eval.py", RESULTS) if last == RESULTS else []
        return [*needs, *calls(run, "train.py", OFFSETS, *flags), *test]
    text = ["--text", run.tested] if run.kind == "text" and Path(run.tested).is_file() else []
    script = "eval.py" if run.kind == "asked" else "-m lofit.studies.text_loss"
    test = calls(run, script, last, "--offsets", run.training, *text)
    return [*steps_to(run.training, OFFSETS), *test]


def calls(run: Run, script: str, file: str, *flags: str | Run) -> list[Step]:
    """One call, or of a task in folds one a fold; a run among the flags stands for the folder of
    the same fold, or of its first where `run` has no folds."""
    found = []
    for task, folder in run.parts(folder_of(run)).items():
        words = ["python", *script.split(), "--model", run.model, "--task", task]
        words += ["--data", run.data, "--seed", str(run.seed), "--dtype", run.dtype]
        words += ["--quantize", run.quantize] if run.quantize else []
        words += ["--run", str(folder)]
        for flag in flags:
            if isinstance(flag, Run):
                made = flag.parts(folder_of(flag))
                flag = str(made.get(task) or next(iter(made.values())))
            words.append(flag)
        found.append(Step(run, folder / file, shlex.join(words)))
    return found


def training_flags(run: Run, heads: str | Run) -> list[str | Run]:
    """What train.py takes beside the common flags. heads: a word, or the run that chose them."""
    # the records, older than --strength, say --alpha
    flags = shlex.split(run.train.replace("--alpha ", "--strength "))
    if run.lr_factor != 1:
        flags += ["--lr", f"{recipe_lr(run) * run.lr_factor:.3g}"]
    if run.method != "lofit":
        return ["--method", run.method, *flags]
    return ["--heads", heads, *([] if run.by == "all" else ["--top", run.k]), *flags]


def recipe_lr(run: Run) -> float:
    """The recipe's learning rate for a run's number of heads."""
    config = ModelConfig.from_file(find_folder(run.model) / "config.json")
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in CausalLM(config).parameters())
    total = config.num_hidden_layers * config.num_attention_heads
    k = total if run.k == "all" else count_heads(run.k, config)
    task = find_tasks(run.task)[0].name.partition("-")[0]
    return find_recipe(config, task, n_parameters)[1].lr_of(k, total)
