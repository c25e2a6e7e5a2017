"""Runs what a study lacks: calls of the scripts, each as a person would make it, and each once.

What a call leaves (heads, offsets, answers) lies in a folder of its own under runs/studies; what it
measured goes to the records. A study that was stopped goes on where it was. Where a record is there
and the files that another call needs are not, as in a clone, that call is made again for its files,
and the record stays.
"""

import fcntl
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.llm.checkpoint import find_folder
from lofit.llm.config import ModelConfig
from lofit.llm.device import pick_device
from lofit.llm.files import read_json
from lofit.recipes import count_heads, find_recipe
from lofit.run.arguments import OFFSETS, find_task
from lofit.run.artefacts import HEADS, PREDICTIONS, results_files
from lofit.studies import text_loss
from lofit.studies.records import Records, Run, read_evaluation, read_selection, read_training

WORK = Path("runs/studies")
TEXT_LOSS = "text_loss"  # in the records; called as a module
FILES = {"select_heads.py": HEADS, "train.py": OFFSETS, "eval.py": PREDICTIONS}  # others need them


@dataclass(frozen=True)
class Call:
    """A call of a script that is part of a run."""

    run: Run
    script: str

    @property
    def folder(self) -> Path:
        run = self.run
        named = ("select", "heads_of")  # their values could be another field's
        values = {k: v for k, v in run.as_dict().items() if k not in ("model", "task")}
        names = [f"{k} {v}" if k in named else str(v) for k, v in values.items()]
        return WORK.joinpath(*(re.sub(r"[^\w.%]+", "-", part) for part in
                               (run.model, run.task, "_".join(names))))  # fmt: skip

    def needs(self) -> list["Call"]:
        """The calls whose files it reads."""
        run = self.run
        if run.kind in ("base", "select"):
            return []
        if self.script == "train.py":
            fixed = run.method != "lofit" or run.by in ("random", "all")
            return [] if fixed else [Call(run.selection, "select_heads.py")]
        trained = Call(replace(run, kind="train", tested=""), "train.py")
        if run.kind == "text":
            return [trained]
        return [trained, Call(run.base, "eval.py")]

    def has_files(self) -> bool:
        """Whether what others read of it is on disk."""
        if self.script not in FILES:
            return True
        folds = find_task(self.run.task)[1].FOLDS
        parts = [""] if folds is None else [f"fold{fold}" for fold in folds]
        name = FILES[self.script]
        if self.script == "eval.py":
            name = results_files("test", self.run.kind == "base")[1]
        return all((self.folder / part / name).exists() for part in parts)

    def args(self) -> list[str]:
        """The script's arguments but the device."""
        run = self.run
        task = run.tested if run.kind in ("asked", "text") and not is_text(run) else run.task
        args = ["--model", run.model, "--task", task, "--data", run.data, "--seed", str(run.seed)]
        args += ["--dtype", run.dtype, "--run", str(self.folder)]
        folders = [self._files_of(need, task) for need in self.needs()]
        if self.script == "select_heads.py":
            return [
                *args,
                *([] if run.by == "scales" else ["--by", run.by]),
                *shlex.split(run.select),
            ]
        if self.script == "train.py":
            return [*args, "--validate", "last", *self._training(folders)]
        if run.kind == "text":
            text = ["--text", run.tested] if is_text(run) else []
            return [*args, "--offsets", folders[0], *text]
        if run.kind == "base":
            return [*args, "--split", "test", "--base-only"]
        offsets = ["--offsets", folders[0]] if run.kind == "asked" else []
        return [*args, "--split", "test", *offsets, "--base-from", folders[1]]

    def _training(self, folders: list[str]) -> list[str]:
        run = self.run
        flags = shlex.split(run.train)
        if run.lr_factor != 1:
            flags += ["--lr", f"{recipe_lr(run) * run.lr_factor:.3g}"]
        if run.method != "lofit":
            return ["--method", run.method, *flags]
        heads = folders[0] if folders else run.by
        return ["--heads", heads, *([] if run.by == "all" else ["--top", run.k]), *flags]

    def _files_of(self, need: "Call", task: str) -> str:
        """The folder of what it needs; the first fold's where `task` itself has no folds."""
        folds = [find_task(name)[1].FOLDS for name in (need.run.task, task)]
        one_fold = self.run.kind == "text" or not folds[1]
        return str(need.folder / "fold0" if folds[0] and one_fold else need.folder)

    def measured(self) -> tuple[dict, list]:
        """What the record keeps of it, and the scores of all heads."""
        if self.script == "select_heads.py":
            return read_selection(self.folder)
        if self.script == "train.py":
            return read_training(self.folder), []
        if self.script == TEXT_LOSS:
            found = read_json(self.folder / "text_loss.json")
            losses = {who: [round(x, 6) for x in found[who]] for who in ("base", "tuned")}
            return {"fingerprint": found["fingerprint"], "losses": losses}, []
        return read_evaluation(self.folder), []


def is_text(run: Run) -> bool:
    """Whether `tested` is a file of text, not a task."""
    return run.kind == "text" and Path(run.tested).is_file()


def recipe_lr(run: Run) -> float:
    """The recipe's learning rate for a run's number of heads."""
    folder = find_folder(run.model, wanted=("config.json",))
    config = ModelConfig.from_file(folder / "config.json")
    total = config.num_hidden_layers * config.num_attention_heads
    k = total if run.k == "all" else count_heads(run.k, config)
    return find_recipe(config, find_task(run.task)[0])[1].lr_of(k, total)


def other_offsets(trained: dict, tested: dict) -> bool:
    """Whether a test has other offsets than its training, as far as both are known; a task in folds
    may be tested with one fold's."""
    hashes = [part.get("offsets_hash", []) for part in (trained, tested)]
    was, now = ({found} if isinstance(found, str) else {*found} for found in hashes)
    return bool(was) and not now <= was


def run_missing(missing: Callable[[], list[Call]], records: Records, jobs: int, device: str) -> int:
    """Run `missing()`, which is asked again after each call, with all they need, `jobs` at a time.
    Prints how much there is to do. Returns how many calls failed, each told in one line; jobs = 0
    runs none. Ctrl-C ends the scripts."""
    todo = with_needs(missing(), records)
    if not todo:
        return 0
    known = [records.seconds_of(call.run.model, call.script) for call in todo]
    minutes = sum(sum(s) / len(s) for s in known if s) / max(jobs, 1) / 60
    text = f": about {minutes:.0f} minutes by the recorded ones" if all(known) else ""
    print(f"{len(todo)} calls are not recorded{text if jobs else ''}", flush=True)
    return len(_Runner(records, jobs, device).run(missing)) if jobs else 0


def with_needs(calls: list[Call], records: Records) -> list[Call]:
    """Each call once, after those that it needs and that are not recorded with their files."""
    found: dict[Call, None] = {}
    for call in calls:
        needs = [need for need in call.needs() if not is_made(need, records)]
        found |= dict.fromkeys([*with_needs(needs, records), call])
    return list(found)


def is_made(call: Call, records: Records) -> bool:
    return records.done(call.run, call.script) and call.has_files()


class _Runner:
    """The scripts that run now."""

    def __init__(self, records: Records, jobs: int, device: str):
        self.records, self.jobs, self.device = records, jobs, device
        cuda = pick_device(device).startswith("cuda")
        self.machine = torch.cuda.get_device_name() if cuda else "cpu"
        self.children: set[subprocess.Popen] = set()
        self.stopping = threading.Event()
        self.gpus: queue.SimpleQueue = queue.SimpleQueue()  # free ones, where there are several
        for name in _gpus() if device in ("auto", "cuda") else []:
            self.gpus.put(name)

    def run(self, missing: Callable[[], list[Call]]) -> set[Call]:
        failed: set[Call] = set()
        running: dict[Future, Call] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    for call in with_needs(missing(), self.records):
                        if call in failed or call in running.values():
                            continue
                        if failed & {*call.needs()}:
                            self._failed(call, failed, "what it needs failed")
                        elif len(running) < self.jobs and self._ready(call):
                            running[pool.submit(self._make, call)] = call
                    if not running:
                        return failed
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        call, error = running.pop(future), future.exception()
                        if isinstance(error, InputError):
                            self._failed(call, failed, error)
                        elif error is not None:
                            raise error
            except BaseException:
                self._end()
                raise

    def _ready(self, call: Call) -> bool:
        return all(is_made(need, self.records) for need in call.needs())

    def _failed(self, call: Call, failed: set[Call], why: object) -> None:
        failed.add(call)
        print(f"failed: {call.script} {call.run.title}: {why}", file=sys.stderr, flush=True)

    def _make(self, call: Call) -> None:
        with self._turn(call.folder):
            if self.stopping.is_set() or is_made(call, self.records):
                return
            began = time.time()
            self.call(call)
            if self.stopping.is_set():
                return
            seconds = round(time.time() - began, 2)
            found, grids = call.measured()
            self._check_offsets(call.run, found)
            if not self.records.done(call.run, call.script):
                found |= {"seconds": {call.script: seconds}, "device": {call.script: self.machine}}
                self.records.add(call.run, found, grids)
            print(f"{call.script} {call.run.title}: {seconds:.0f} s", flush=True)

    def _check_offsets(self, run: Run, found: dict) -> None:
        """InputError if the offsets of a training or a test are not the recorded training's: made
        again on another machine, they may differ."""
        trained = self.records.of(replace(run, kind="train", tested=""))
        if other_offsets(trained, found):
            raise InputError(
                "its offsets are not those of the recorded training, and it is not recorded; with"
                " another folder for --records both are made anew"
            )

    @contextmanager
    def _turn(self, folder: Path) -> Iterator[None]:
        """Wait while another study fills this folder; its records are read afterwards."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".turn").open("w") as lock:
            while not self.stopping.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self.stopping.wait(1)
            self.records.forget()
            yield

    def call(self, call: Call) -> None:
        """Run a script; its output goes to the folder. Raises InputError with its last line."""
        script = ["-m", text_loss.__name__] if call.script == TEXT_LOSS else [call.script]
        command = [sys.executable, *script, *call.args(), "--device", self.device]
        log = call.folder / "output.txt"
        gpu = None if self.gpus.empty() else self.gpus.get()
        threads = max(1, torch.get_num_threads() // self.jobs)
        share = {"OMP_NUM_THREADS": str(threads)} if self.jobs > 1 else {}
        share |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with log.open("a", encoding="utf-8") as output:
            print("$", shlex.join(command), file=output, flush=True)
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | share
            )
            self.children.add(child)
            try:
                code = child.wait()
            finally:
                self.children.discard(child)
                if gpu is not None:
                    self.gpus.put(gpu)
        if code and not self.stopping.is_set():
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1].removeprefix("error: ")
            raise InputError(f"{call.script} ended with {code}: {last} -> {log}")

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
