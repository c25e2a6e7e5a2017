"""Where a stopped run goes on: SCRIPT.unfinished in its folder, gone when the run is whole.

A file says of what it is: all settings, the weights' fingerprint, a hash of the examples. The same
command goes on from it, and ends with the same bits on CPU; any other starts anew and says why.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from lofit.distributed.group import agree
from lofit.errors import InputError, interrupted
from lofit.files import is_first, read_tensors, write_tensors
from lofit.llm.files import parse_json
from lofit.llm.generate import Compute, Keep

SHARE = 0.01  # of the time may go into writing states: the next one waits that long


class Progress:
    """A training's state. Without a path nothing is kept.

    about: of what it is; log: the run's log.jsonl; remember: what a loss keeps of a batch of the
    first epoch is no part of the state, so it is told to compute that again, in the same batches,
    for in others it might round differently; generators: what the loss draws from.
    """

    def __init__(
        self,
        path: Path | None = None,
        about: dict | None = None,
        log: Path | None = None,
        remember: Callable[[list[int]], object] = lambda rows: None,
        generators: tuple[torch.Generator, ...] = (),
    ):
        self.path, self.about, self.log = path, about, log
        self.remember, self.generators = remember, generators
        self.losses: list[float] = []  # of every step
        self.next_write, self.failed = 0.0, False

    def restore(self, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Put a stopped run's values into parameters and optimiser; returns how many steps it had
        done. 0, with all as it is, where there is none, or it was another."""
        done = self._restore(parameters, optimizer)
        agree("the step to go on from", done)
        return done

    def _restore(self, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
        self.parameters, self.optimizer = parameters, optimizer
        if self.path is None or not self.path.exists():
            return 0
        try:
            tensors, info = read_tensors(self.path)
            _check_same(info.get("about"), self.about)
            self.losses = tensors.pop("losses").tolist()
            self._load(tensors)
            _cut_log(self.log, info["log_bytes"], self.about["script"])
        except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
            self.losses = []
            _anew(self.path, error)
            return 0
        done = len(self.losses)
        print(f"going on behind step {done}, where this run was stopped ({self.path})")
        return done

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {"state": {}}
        for key, tensor in tensors.items():
            kind, index, name = key.split(".")
            parts.setdefault(kind, {}).setdefault(int(index), {})[name] = tensor
        values = [own["value"] for _, own in sorted(parts["parameter"].items())]
        if [value.shape for value in values] != [p.shape for p in self.parameters]:
            raise ValueError("other parameters")
        for i, generator in enumerate(self.generators):
            generator.set_state(parts["draws"][i]["value"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": parts["state"], "param_groups": groups})
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def again(self, rows: list[int], first: bool) -> None:
        """A step that the stopped run did. first: it was of the first epoch."""
        if first:
            self.remember(rows)

    def save(self, loss: float, last: bool) -> None:
        """Behind each step: write the state if it is time to, if the step was the last one, or if a
        signal is about to end the run. A full disk ends no run."""
        self.losses.append(loss)
        began = time.perf_counter()
        if self.path is None or not (last or began >= self.next_write or interrupted()):
            return
        tensors = {f"parameter.{i}.value": p.detach().cpu() for i, p in enumerate(self.parameters)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"state.{i}.{name}": value.cpu() for name, value in state.items()}
        tensors |= {f"draws.{i}.value": g.get_state() for i, g in enumerate(self.generators)}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        log_bytes = self.log.stat().st_size if self.log.exists() else 0
        try:
            write_tensors(self.path, tensors, {"about": self.about, "log_bytes": log_bytes})
        except InputError as error:
            if not self.failed:
                print(f"{error}; the run goes on", file=sys.stderr)
            self.failed = True
        now = time.perf_counter()
        self.next_write = now + (now - began) / SHARE


class Scored:
    """What an evaluation has scored: behind a line of JSON that says of what, one for each batch as
    soon as it is done."""

    def __init__(self, path: Path, about: dict):
        self.path, self.about, self.failed = path, about, False
        self.found: dict[tuple, list] = {}
        data = path.read_bytes() if path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]  # a line that was cut short has no end
        if not data:
            return
        try:
            about_line, *lines = data.decode("utf-8").splitlines()
            _check_same(parse_json(about_line, str(path)), about)
            for line in lines:
                who, rows, found = parse_json(line, str(path))
                self.found[(who, *rows)] = found
            if is_first():
                os.truncate(path, len(data))
            print(f"going on behind {len(lines)} batches, where this run was stopped ({path})")
        except (InputError, OSError, TypeError, ValueError) as error:
            self.found = {}
            _anew(path, error)

    def __call__(self, who: str) -> Keep:
        """Of a batch, what was found for its rows before, or else what is found now. who: the model
        that is asked."""

        def keep(compute: Compute, rows: list[int]) -> list:
            if (who, *rows) not in self.found:
                if not self.found:
                    self._write("w", self.about)
                self.found[(who, *rows)] = found = compute(rows)
                self._write("a", [who, rows, found])
            return self.found[(who, *rows)]

        return keep

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


def digest(value: object) -> str:
    """16 hex digits over what a value prints as."""
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _check_same(found: object, about: dict) -> None:
    """Raise ValueError that names what differs."""
    if not isinstance(found, dict):
        raise ValueError("not a state of this script")
    (old, new) = ({**about, **about.get("settings", {})} for about in (found, about))
    new = json.loads(json.dumps(new))
    keys = [key for key in new | old if key != "settings" and new.get(key) != old.get(key)]
    if keys:
        raise ValueError(", ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in keys[:3]))


def _anew(path: Path, error: Exception) -> None:
    print(f"starting anew, not from {path}: {str(error)[:200]}")


def _cut_log(log: Path, length: int, script: str) -> None:
    """Take out of the log what the stopped run wrote behind its state; it is written again. What
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
