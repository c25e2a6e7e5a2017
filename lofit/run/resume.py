"""Going on where a run was stopped: one file, SCRIPT.unfinished in the run folder.

The file names all that the run depends on: settings, fingerprint of the weights, hash of the
examples. The same command goes on from it and ends with the same bits on a CPU. Any other command
starts again and says why. The file goes when the run is whole.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.files import is_first, read_tensors, write_tensors
from lofit.llm.files import parse_json
from lofit.llm.generate import Compute, Memo
from lofit.training import Training

SHARE = 0.01  # of the time may go into writing states: the next one waits that long


class TrainingState:
    """The state of a training on disk: an `on_step` of `training.fit`.

    path: the file; metadata: what the training depends on; log: the run's log.jsonl. A copy of the
    state is taken after each step (a few thousand values), so that what `write` writes is whole at
    any moment, also when a signal stops a step half-way.
    """

    def __init__(self, path: Path, metadata: dict, log: Path):
        self.path, self.metadata, self.log = path, metadata, log
        self.latest: tuple[dict, int] | None = None  # tensors, size of the log in bytes
        self.next_write, self.failed = 0.0, False

    def restore(self, training: Training) -> None:
        """Put a stopped run's state into a training, if there is one and it is of this run."""
        if not self.path.exists():
            return
        try:
            tensors, info = read_tensors(self.path)
            _check_same(info.get("about"), self.metadata)
            load_state(training, tensors)
            _cut_log(self.log, info["log_bytes"], self.metadata["script"])
        except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
            training.losses.clear()
            _start_again(self.path, error)
            return
        done = len(training.losses)
        for rows in training.epochs[0][:done]:  # same batches as then, so the same rounding
            training.objective.fill_cache(rows)
        print(f"continuing after step {done}, where this run was stopped ({self.path})")

    def __call__(self, training: Training, record: dict) -> None:
        """Copy the state; write it if it is time to, or after the last step."""
        log_bytes = self.log.stat().st_size if self.log.exists() else 0
        self.latest = (state_of(training), log_bytes)
        last = len(training.losses) == training.total
        if last or time.perf_counter() >= self.next_write:
            self.write()

    def write(self) -> None:
        """Write the latest state. A full disk does not stop the run."""
        if self.latest is None:
            return
        began = time.perf_counter()
        tensors, log_bytes = self.latest
        try:
            write_tensors(self.path, tensors, {"about": self.metadata, "log_bytes": log_bytes})
        except InputError as error:
            if not self.failed:
                print(f"{error}; the run goes on", file=sys.stderr)
            self.failed = True
        now = time.perf_counter()
        self.next_write = now + (now - began) / SHARE


def state_of(training: Training) -> dict[str, torch.Tensor]:
    """A copy of parameters, optimiser state, random generators and losses, by name."""
    tensors = {"losses": torch.tensor(training.losses, dtype=torch.float64)}
    states = training.optimizer.state_dict()["state"]
    for i, parameter in enumerate(training.parameters):
        tensors[f"value.{i}"] = parameter.detach().clone()
        tensors |= {f"{name}.{i}": tensor.clone() for name, tensor in states[i].items()}
    for i, generator in enumerate(training.generators):
        tensors[f"generator.{i}"] = generator.get_state()
    return tensors


def load_state(training: Training, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_of`. Raises KeyError, ValueError or RuntimeError if it does not fit."""
    losses = tensors["losses"].tolist()
    states = training.optimizer.state_dict()
    for i, parameter in enumerate(training.parameters):
        if tensors[f"value.{i}"].shape != parameter.shape:
            raise ValueError("other parameters")
        names = ("step", "exp_avg", "exp_avg_sq")
        states["state"][i] = {name: tensors[f"{name}.{i}"] for name in names}
    for i, generator in enumerate(training.generators):
        generator.set_state(tensors[f"generator.{i}"])
    training.optimizer.load_state_dict(states)
    with torch.no_grad():
        for i, parameter in enumerate(training.parameters):
            parameter.copy_(tensors[f"value.{i}"])
    training.losses[:] = losses


class ScoredBatches:
    """Append-only log of scored batches. Line 1: what they depend on; then one JSON line each."""

    def __init__(self, path: Path, metadata: dict):
        self.path, self.metadata, self.failed = path, metadata, False
        self.found: dict[tuple, list] = {}
        data = path.read_bytes() if path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]  # a line that was cut short has no end
        if not data:
            return
        try:
            first, *lines = data.decode("utf-8").splitlines()
            _check_same(parse_json(first, str(path)), metadata)
            for line in lines:
                who, rows, found = parse_json(line, str(path))
                self.found[(who, *rows)] = found
            if is_first():
                os.truncate(path, len(data))
            print(f"continuing after {len(lines)} batches, where this run was stopped ({path})")
        except (InputError, OSError, TypeError, ValueError) as error:
            self.found = {}
            _start_again(path, error)

    def __call__(self, who: str) -> Memo:
        """A memo of the scores of one model: a batch that is in the log is not computed again."""

        def memo(compute: Compute, rows: list[int]) -> list:
            if (who, *rows) not in self.found:
                if not self.found:
                    self._write("w", self.metadata)
                self.found[(who, *rows)] = found = compute(rows)
                self._write("a", [who, rows, found])
            return self.found[(who, *rows)]

        return memo

    def _write(self, mode: str, line: object) -> None:
        if not is_first():
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if not self.failed:
                print(f"{self.path}: cannot be written ({error.strerror})", file=sys.stderr)
            self.failed = True


def _check_same(found: object, metadata: dict) -> None:
    """Raise ValueError that names what differs."""
    if not isinstance(found, dict):
        raise ValueError("not a state of this script")
    (old, new) = ({**about, **about.get("settings", {})} for about in (found, metadata))
    new = json.loads(json.dumps(new))
    keys = [key for key in new | old if key != "settings" and new.get(key) != old.get(key)]
    if keys:
        raise ValueError(", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in keys[:3]))


def _start_again(path: Path, error: Exception) -> None:
    print(f"starting from the beginning, not from {path}: {str(error)[:200]}")


def _cut_log(log: Path, length: int, script: str) -> None:
    """Take out of the log what the stopped run wrote after its state: it is written again. What
    other scripts wrote since stays."""
    mine = f'{{"script": "{script}"'.encode()
    if not is_first():
        return
    with suppress(OSError), log.open("r+b") as file:
        file.seek(length)
        theirs = [line for line in file if not line.startswith(mine)]
        file.seek(length)
        file.writelines(theirs)
        file.truncate()
