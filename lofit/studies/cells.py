"""What every study is made of: cells, the folders that calls of the scripts fill.

A cell is run as a person would run it, by select_heads.py, train.py and eval.py, and each step of
it once: a step whose files are there is not run again, so a study that was stopped goes on where
it was. Files are written whole or not at all; `cell.json` beside them says by which command.
"""

import argparse
import fcntl
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.files import write_json
from lofit.llm.device import pick_device
from lofit.llm.files import read_json
from lofit.run.arguments import find_task
from lofit.run.artefacts import ADAPTER_CONFIG, PREDICTIONS
from lofit.studies.tables import keep_items

RECORD, OUTPUT, LOCK = "cell.json", "output.txt", ".cell.lock"


@dataclass(frozen=True)
class Step:
    """A call of a script, and the files in `folder` that tell that it is done."""

    script: str
    args: tuple[str, ...]
    folder: Path
    files: tuple[str, ...]

    def done(self) -> bool:
        """Raises InputError where the files are there and other flags made them."""
        if not all((self.folder / name).exists() for name in self.files):
            return False
        made = _record(self.folder).get(self.script)
        if made and made["args"] != list(self.args):
            raise InputError(
                f"{self.folder}: made by `{self.script} {shlex.join(made['args'])}`, asked for"
                f" `{shlex.join(self.args)}`; choose another --out, or remove this folder"
            )
        return bool(made)

    def seconds(self) -> float:
        """What it took; 0 if it is not done."""
        return _record(self.folder).get(self.script, {}).get("seconds", 0.0)


@dataclass(frozen=True, eq=False)
class Cell:
    """Steps, one after the other, once the cells that it needs are done. Steps that only these can
    tell (evaluate the best of several) are given by a function."""

    name: str
    steps: list[Step] | Callable[[], list[Step]]
    needs: tuple["Cell", ...] = ()

    def todo(self) -> list[Step]:
        """The steps that are not done; all cells that it needs must be."""
        steps = self.steps() if callable(self.steps) else self.steps
        return [step for step in steps if not step.done()]

    def done(self) -> bool:
        return all(cell.done() for cell in self.needs) and not self.todo()


@dataclass(frozen=True)
class Setting:
    """What all steps of a cell are told: model, task, data and seed."""

    model: str
    task: str
    data: str
    seed: int
    dtype: str = "auto"
    split: str = "test"

    @property
    def name(self) -> str:
        """Of the folder of this model and task."""
        return f"{self.model.rstrip('/').replace('/', '--')}/{find_task(self.task)[0]}"

    def select(self, folder: Path, *flags: str) -> Step:
        return self._step("select_heads.py", folder, "heads.json", flags)

    def train(self, folder: Path, *flags: str) -> Step:
        flags = ("--validate", "last", *flags)
        return self._step("train.py", folder, ADAPTER_CONFIG, flags)

    def evaluate(self, folder: Path, *flags: str) -> Step:
        """flags: --base-from where the base model was asked."""
        flags = ("--split", self.split, *flags)
        return self._step("eval.py", folder, "results.json", flags, whole=True)

    def ask_base(self, folder: Path) -> Step:
        """Done only while its predictions are there, which --base-from reads: they hold the data's
        words, and are not published with a cell."""
        predictions = self._step("eval.py", folder, PREDICTIONS, ()).files
        step = self.evaluate(folder, "--base-only")
        return replace(step, files=(*step.files, *predictions))

    def _step(self, script, folder, file, flags, whole=False) -> Step:
        args = ("--model", self.model, "--task", self.task, "--data", self.data)
        args += ("--seed", str(self.seed), "--dtype", self.dtype, "--run", str(folder))
        folds = None if whole else find_task(self.task)[1].FOLDS
        files = (file,) if folds is None else tuple(f"fold{fold}/{file}" for fold in folds)
        return Step(script, (*args, *flags), folder, files)


def add_study_args(parser: argparse.ArgumentParser, out: str) -> None:
    """The arguments that every study has."""
    arg = parser.add_argument
    arg("--model", nargs="+", default=["weights/mini-llama", "weights/mini-gemma"])
    arg("--task", nargs="+", default=["mquake", "clutrr", "truthfulqa"])
    arg("--data", default="data/mini")
    arg("--split", default="test", choices=("val", "test"))
    arg("--seeds", nargs="+", type=int, default=[42, 43, 44])
    arg("--dtype", default="auto", help="of the base model's weights")
    arg("--device", default="auto")
    arg("--jobs", type=int, default=1, help="cells side by side; 0: only the table of what is done")
    arg("--out", type=Path, default=Path(out), help="(default: %(default)s)")


def run_cells(cells: list[Cell], jobs: int = 1, device: str = "auto") -> list[Cell]:
    """Run what is not done of these cells and of those they need, `jobs` at a time; says how much
    there is to do and, from the first ones, how long it will take. Returns the cells that failed,
    each told in one line; jobs = 0 runs none. Ctrl-C ends the scripts."""
    cells = _with_needs(cells)
    waiting = [cell for cell in cells if not cell.done()]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} done{_forecast(cells, waiting, jobs)}")
    if not waiting or jobs < 1:
        return []
    return _Runner(jobs, device, len(waiting)).run(waiting)


def finish(failed: list[Cell]) -> None:
    """Behind the table: InputError, hence exit code 2, if cells failed."""
    if failed:
        raise InputError(f"{len(failed)} cells failed; mend what their logs say, and start again")


class _Runner:
    """The scripts that run now, and what came of those before."""

    def __init__(self, jobs: int, device: str, total: int):
        self.jobs, self.device, self.total = jobs, device, total
        cuda = pick_device(device).startswith("cuda")
        self.machine = torch.cuda.get_device_name() if cuda else "cpu"  # told in every record
        self.children: set[subprocess.Popen] = set()
        self.stopping = threading.Event()
        self.gpus = queue.SimpleQueue()  # those that no script has, where there are several
        for i in _gpus() if device in ("auto", "cuda") else []:
            self.gpus.put(i)
        self.began = time.time()

    def run(self, waiting: list[Cell]) -> list[Cell]:
        failed: list[Cell] = []
        running: dict[Future, Cell] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    open_cells = {*waiting, *running.values()}
                    for cell in list(waiting):
                        if any(need in failed for need in cell.needs):
                            self._tell(cell, failed, "what it needs failed")
                            waiting.remove(cell)
                        elif len(running) < self.jobs and not open_cells & {*cell.needs}:
                            running[pool.submit(self._fill, cell)] = cell
                            waiting.remove(cell)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        cell, error = running.pop(future), future.exception()
                        self._tell(cell, failed, error, len(waiting) + len(running))
            except BaseException:
                self._end()
                raise
        return failed

    def _tell(self, cell, failed, error, left=0) -> None:
        """One line for a cell that ended; an error that is no script's stops the study."""
        if error is None:
            seconds = time.time() - self.began
            per_cell = seconds / (self.total - left)
            rest = f", about {per_cell * left / 60:.0f} minutes left" if left else ""
            text = f"[{self.total - left}/{self.total}] {cell.name}{rest}"
            print(text, flush=True)
        elif isinstance(error, InputError | str):
            failed.append(cell)
            print(f"failed: {cell.name}: {error}", file=sys.stderr, flush=True)
        else:
            raise error

    def _fill(self, cell: Cell) -> None:
        for step in cell.todo():
            with self._turn(step.folder):
                if self.stopping.is_set():
                    return
                if step.done():  # by another study, meanwhile
                    continue
                began = time.time()
                self.call(step)
                if self.stopping.is_set():
                    return
                if step.script == "eval.py":
                    keep_items(step.folder)
                made = {"args": list(step.args), "seconds": round(time.time() - began, 1)}
                made["device"] = self.machine
                write_json(step.folder / RECORD, _record(step.folder) | {step.script: made})

    @contextmanager
    def _turn(self, folder: Path) -> Iterator[None]:
        """Wait while another study fills this folder: the cells of a job array share some."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            while not self.stopping.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self.stopping.wait(1)
            yield

    def call(self, step: Step) -> None:
        """Run a script; its output goes to the folder. Raises InputError with its last line."""
        step.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *step.script.split(), *step.args, "--device", self.device]
        log = step.folder / OUTPUT
        gpu = None if self.gpus.empty() else self.gpus.get()
        threads = max(1, torch.get_num_threads() // self.jobs)
        share = {"OMP_NUM_THREADS": str(threads)} if self.jobs > 1 else {}
        share |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with log.open("a", encoding="utf-8") as output:
            print("$", shlex.join(command), file=output, flush=True)
            if self.stopping.is_set():
                return
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | share
            )
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
            if gpu is not None:
                self.gpus.put(gpu)
        if code and not self.stopping.is_set():
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1].removeprefix("error: ")
            raise InputError(f"{step.script} ended with {code}: {last} -> {log}")

    def _end(self) -> None:
        self.stopping.set()
        for child in list(self.children):
            child.send_signal(signal.SIGINT)
        for child in list(self.children):
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def _gpus() -> list[str]:
    """The visible GPUs, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _with_needs(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, behind those that it needs."""
    found: dict[Cell, None] = {}
    for cell in cells:
        found |= dict.fromkeys([*_with_needs(cell.needs), cell])
    return list(found)


def _forecast(cells: list[Cell], waiting: list[Cell], jobs: int) -> str:
    """What is to do, and how long that takes if it takes as long as what was done before."""
    if not waiting:
        return ""
    text = f", {len(waiting)} to do, {jobs} at a time"
    steps = [s for c in cells if c not in waiting and not callable(c.steps) for s in c.steps]
    if seconds := [step.seconds() for step in steps]:
        n_done = len(cells) - len(waiting)
        text += f", about {sum(seconds) / n_done * len(waiting) / max(1, jobs) / 60:.0f} minutes"
        return f"{text} if they take as long as those done"
    return f"{text}; the first ones will tell how long it takes"


def _record(folder: Path) -> dict:
    """script -> {args, seconds} of what was run there."""
    path = folder / RECORD
    return read_json(path) if path.exists() else {}
