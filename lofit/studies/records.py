"""Recorded runs: MODEL.jsonl, one line a run, and MODEL.scores.json.gz, the scores of all heads.

A line starts with what identifies the run (`Run`, without what has its default); then stands what
was measured: settings, heads, trained values, scores, hits, and by script the seconds and the
device. Hits are the items' scores in the order of the data: a string of digits where each is 0 or
1, else a list of numbers. The base model's hits stand once, in the line of kind "base".
"""

import fcntl
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_jsonl, write_atomic, write_text
from lofit.llm.files import parse_json, read_json
from lofit.run.artefacts import ADAPTER_CONFIG, HEADS, RESULTS, results_files

Grid = list[list[float]]  # [layer][head]
BASE_SEED = 42  # nothing is drawn when the base model is asked: one seed serves all


@dataclass(frozen=True)
class Run:
    """What identifies a run."""

    kind: str  # base (no edits), select, train, asked (tested on another task), text (its loss)
    model: str
    task: str
    data: str
    seed: int
    dtype: str
    method: str = ""  # of train.py
    by: str = ""  # the way of choosing heads, or "random", or "all"
    k: str = ""  # how many heads, as --top takes it
    heads_of: str = ""  # the other task that the heads were chosen for
    select: str = ""  # more flags of select_heads.py
    train: str = ""  # more flags of train.py
    lr_factor: float = 1.0  # times the recipe's learning rate
    tested: str = ""  # kind asked: the other task; kind text: the other task, or the text's name

    @property
    def title(self) -> str:
        """All of it but the model, in one line."""
        return " ".join(str(value) for key, value in self.as_dict().items() if key != "model")

    @property
    def base(self) -> "Run":
        """The run that asked the base model what this one was tested on."""
        task = self.tested or self.task
        return Run("base", self.model, task, self.data, BASE_SEED, self.dtype)

    @property
    def selection(self) -> "Run":
        """The run that chose the heads."""
        of = (self.model, self.heads_of or self.task, self.data, self.seed, self.dtype)
        return Run("select", *of, by=self.by, select=self.select)

    def as_dict(self) -> dict:
        """The fields that are not at their default."""
        found = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in found.items() if value != default}


class Records:
    """The recorded runs of a folder, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._runs: dict[str, dict[Run, dict]] = {}

    def of(self, run: Run) -> dict:
        """What was measured of a run; {} if it is not recorded."""
        return self.of_model(run.model).get(run, {})

    def done(self, run: Run, script: str) -> bool:
        return script in self.of(run).get("seconds", {})

    def seconds_of(self, model: str, script: str) -> list[float]:
        """What each run of a script took for a model."""
        found = [line.get("seconds", {}) for line in self.of_model(model).values()]
        return [seconds[script] for seconds in found if script in seconds]

    def grids(self, run: Run) -> list[Grid]:
        """The scores of all heads of a run of kind select, of each fold; [] if there are none."""
        return self._read_grids(run.model).get(run.title, [])

    def add(self, run: Run, found: dict, grids: list[Grid] | None = None) -> None:
        """Add to a run's line, and write the file whole, so that a kill leaves the old one."""
        with self._locked(run.model):
            runs = self._runs[_name(run.model)] = self._read(run.model)
            old = runs.get(run, {})
            merged = {key: old.get(key, {}) | found[key] for key in ("seconds", "device")}
            runs[run] = old | found | merged
            if grids:
                kept = self._read_grids(run.model) | {run.title: grids}
                text = json.dumps(kept, separators=(",", ":"))
                data = gzip.compress(text.encode(), mtime=0)
                write_atomic(self._path(run.model, "scores.json.gz"), lambda p: p.write_bytes(data))
            write_text(self._path(run.model, "jsonl"), "".join(map(as_line, runs.items())))

    def forget(self) -> None:
        """Read the files again when they are asked for next: another study may have written."""
        self._runs = {}

    def of_model(self, model: str) -> dict[Run, dict]:
        """All recorded runs of a model, and what was measured of each."""
        name = _name(model)
        if name not in self._runs:
            self._runs[name] = self._read(model)
        return self._runs[name]

    def _path(self, model: str, suffix: str) -> Path:
        return self.folder / f"{_name(model)}.{suffix}"

    def _read(self, model: str) -> dict[Run, dict]:
        path = self._path(model, "jsonl")
        return dict(map(from_line, read_jsonl(path))) if path.exists() else {}

    def _read_grids(self, model: str) -> dict[str, list[Grid]]:
        path = self._path(model, "scores.json.gz")
        if not path.exists():
            return {}
        try:
            text = gzip.decompress(path.read_bytes()).decode()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable ({error}); restore it from git") from None
        return parse_json(text, str(path))

    @contextmanager
    def _locked(self, model: str) -> Iterator[None]:
        """Hold a model's files, which other studies write too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path(model, "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _name(model: str) -> str:
    return Path(model).name


def as_line(item: tuple[Run, dict]) -> str:
    run, found = item
    return json.dumps(run.as_dict() | found, ensure_ascii=False) + "\n"


def from_line(item: tuple[str, dict]) -> tuple[Run, dict]:
    """Inverse of `as_line`, of a line and where it stands. InputError if it names no run."""
    where, line = item
    names = {field.name for field in fields(Run)}
    try:
        run = Run(**{key: value for key, value in line.items() if key in names})
    except TypeError as error:
        raise InputError(f"{where}: not a recorded run ({error})") from None
    return run, {key: value for key, value in line.items() if key not in names}


def pack(scores: list[float]) -> str | list[float]:
    """Scores of items -> "0110..." where each is 0 or 1, else numbers of four decimals."""
    if set(scores) <= {0, 1}:
        return "".join(str(int(score)) for score in scores)
    return [round(score, 4) for score in scores]


def unpack(hits: str | list[float]) -> list[float]:
    """Inverse of `pack`."""
    return [float(hit) for hit in hits]


def read_selection(folder: Path) -> tuple[dict, list[Grid]]:
    """(what a record keeps of select_heads.py's folder, the scores of all heads of each fold)."""
    found = [read_json(path) for path in _of_folds(folder, HEADS)]
    kept = {"fingerprint": found[0]["fingerprint"], "settings": _settings(found[0])}
    return kept | {"heads": _one([f["heads"] for f in found])}, [f["scores"] for f in found]


def read_training(folder: Path) -> dict:
    """What a record keeps of train.py's folder; of a task in folds lists, one entry a fold."""
    found = [read_json(path) for path in _of_folds(folder, ADAPTER_CONFIG)]
    kept = {"fingerprint": found[0]["fingerprint"], "settings": _settings(found[0])}
    for key in ("heads", "trained_values", "offsets_hash", "val"):
        if key in found[0]:
            kept[key] = _one([f[key] for f in found])
    return kept


def read_evaluation(folder: Path) -> dict:
    """What a record keeps of eval.py's folder: mean scores, and the items' where it asked the base
    model alone, or the tuned one's."""
    names = results_files("test", not (folder / RESULTS).exists())
    results = read_json(folder / names[0])
    lines = [line for p in _of_folds(folder, names[1]) for _, line in read_jsonl(p)]
    who = "tuned" if "tuned" in results else "base"
    parts = [read_json(path) for path in _of_folds(folder, names[0])]
    kept = {"n": _one([part["n"] for part in parts]), "fingerprint": results["fingerprint"]}
    kept["base"] = results["base"]
    if who == "tuned":
        hashes = [part["offsets_hash"] for part in parts]
        values = results["trained_values"]
        kept |= {"tuned": results["tuned"], "trained_values": values, "offsets_hash": _one(hashes)}
    kept |= {key: results[key] for key in ("always", "given", "groups") if key in results}
    metrics = results[who]
    return kept | {"hits": {m: pack([line[who][m] for line in lines]) for m in metrics}}


def _of_folds(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"fold*/{name}")) or [folder / name]


def _one(values: list):
    """The value itself where there are no folds."""
    return values[0] if len(values) == 1 else values


def _settings(found: dict) -> dict:
    """Without what the run's identity says already."""
    return {k: v for k, v in found["settings"].items() if k not in ("heads", "by")}
