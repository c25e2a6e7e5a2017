"""Recorded runs: MODEL.jsonl, one line a run, and MODEL.scores.json.gz, the scores of all heads.

    python -m lofit.studies.records FOLDER ...     # record the runs of these folders

A line starts with what identifies the run (`Run`, without what has its default); then stands what
was measured, see docs/results/README.md.
"""

import argparse
import gzip
import itertools
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from filelock import FileLock

from lofit import errors
from lofit.errors import InputError
from lofit.files import hash_of, read_json, read_jsonl, read_tensors, write, write_jsonl
from lofit.run.files import HEADS, OFFSETS, PREDICTIONS, RESULTS
from lofit.run.summary import mean
from lofit.tasks import find_tasks

Grid = list[list[float]]  # [layer][head]
BASE_SEED = 42  # nothing is drawn when the base model is asked: one seed serves all
CELL = "cell.json"  # in the folder of a run: which run it is
BASE_RESULTS, BASE_PREDICTIONS = "results-base.json", "predictions-base.jsonl"
TEXT_LOSS = "text_loss.json"
SCRIPTS = {HEADS: "select_heads.py", OFFSETS: "train.py", RESULTS: "eval.py"}  # file -> its script
SCRIPTS |= {BASE_RESULTS: "eval.py", TEXT_LOSS: "text_loss"}


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
    quantize: str = ""  # nf4: the base model in 4 bits

    @property
    def title(self) -> str:
        """All of it but the model, in one line."""
        return " ".join(str(value) for key, value in self.as_dict().items() if key != "model")

    @property
    def base(self) -> "Run":
        """The run that asked the base model what this one was tested on."""
        of = (self.model, self.tested or self.task, self.data, BASE_SEED, self.dtype)
        return Run("base", *of, quantize=self.quantize)

    @property
    def selection(self) -> "Run":
        """The run that chose the heads."""
        of = (self.model, self.heads_of or self.task, self.data, self.seed, self.dtype)
        return Run("select", *of, by=self.by, select=self.select, quantize=self.quantize)

    @property
    def training(self) -> "Run":
        """The run that trained what this one tests."""
        return replace(self, kind="train", tested="")

    def as_dict(self) -> dict:
        """The fields that are not at their default."""
        return {k: v for k, v in asdict(self).items() if v != getattr(Run, k, None)}

    def parts(self, folder: Path) -> dict[str, Path]:
        """The tasks that it calls the scripts with, folds each for itself, and their folders."""
        name = self.tested or self.task
        if self.kind == "text" and Path(name).is_file():  # it needs no task
            name = self.task
        found = find_tasks(name)
        names = [task.name for task in found] if len(found) > 1 else [name]
        if self.kind == "text":  # folds share their prompts
            return {names[0]: folder}
        return {name: folder} if len(names) == 1 else {fold: folder / fold for fold in names}


class Records:
    """The recorded runs of a folder, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._runs: dict[Path, dict[Run, dict]] = {}

    def of(self, run: Run) -> dict:
        """What was measured of a run; {} if it is not recorded."""
        return self.of_model(run.model).get(run, {})

    def done(self, run: Run, script: str) -> bool:
        return script in self.of(run).get("seconds", {})

    def of_model(self, model: str) -> dict[Run, dict]:
        """All recorded runs of a model, and what was measured of each."""
        path = self._path(model, "jsonl")
        if path not in self._runs:
            lines = read_jsonl(path) if path.exists() else []
            self._runs[path] = dict(from_line(line) for _, line in lines)
        return self._runs[path]

    def grids(self, model: str) -> dict[str, list[Grid]]:
        """The scores of all heads of a model's selections, by the title: one of each fold."""
        return self._grids(model).get(model, {})

    def add(self, run: Run, found: dict[str, dict], grids: list[Grid]) -> None:
        """Add what each script measured to a run's line; what is recorded already stays. The file
        is written whole, under a lock: no process loses what another adds at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path(run.model, "lock")):
            self._runs = {}  # others may have written
            runs = self.of_model(run.model)
            if other_offsets(runs.get(run.training, {}), found):
                raise InputError(
                    f"{run.title}: its offsets are not those of the recorded training, and it is"
                    " not recorded; with another folder for --records both are made anew"
                )
            line = runs.setdefault(run, {"seconds": {}, "device": {}})
            for script, part in found.items():
                if script not in line["seconds"]:
                    times = {key: line[key] | {script: part[key]} for key in ("seconds", "device")}
                    line |= part | times
            kept = self._grids(run.model)
            if grids and run.title not in kept.setdefault(run.model, {}):
                kept[run.model][run.title] = grids
                text = json.dumps(kept, separators=(",", ":"))
                data = gzip.compress(text.encode(), mtime=0)
                write(self._path(run.model, "scores.json.gz"), data)
            write_jsonl(self._path(run.model, "jsonl"), [r.as_dict() | f for r, f in runs.items()])

    def _grids(self, model: str) -> dict[str, dict[str, list[Grid]]]:
        """Those of all models whose names end alike, by the model: they share the file."""
        path = self._path(model, "scores.json.gz")
        return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}

    def _path(self, model: str, suffix: str) -> Path:
        return self.folder / f"{Path(model).name}.{suffix}"


def from_line(line: dict) -> tuple[Run, dict]:
    """A run, and what was measured of it."""
    names = {field.name for field in fields(Run)}
    run = Run(**{key: value for key, value in line.items() if key in names})
    return run, {key: value for key, value in line.items() if key not in names}


def other_offsets(trained: dict, found: dict[str, dict]) -> bool:
    """Whether a test has other offsets than its recorded training, as far as both are known; a task
    in folds may be tested with one fold's."""

    def hashes(part: dict) -> set[str]:
        known = part.get("offsets_hash", [])
        return {known} if isinstance(known, str) else {*known}

    was = hashes(trained)
    return bool(was) and any(not hashes(part) <= was for part in found.values())


def pack(scores: list[float]) -> str | list[float]:
    """Scores of items -> "0110..." where each is 0 or 1, else numbers of four decimals."""
    if set(scores) <= {0, 1}:
        return "".join(str(int(score)) for score in scores)
    return [round(score, 4) for score in scores]


def unpack(hits: str | list[float]) -> list[float]:
    """Inverse of `pack`."""
    return [float(hit) for hit in hits]


def measured(run: Run, folder: Path) -> tuple[dict[str, dict], list[Grid]]:
    """({script: what a record keeps of what it left in a run's folder}, the scores of all heads).
    Of a task in folds lists, one entry a fold."""
    found, grids = {}, []
    folders = list(run.parts(folder).values())
    for name, script in SCRIPTS.items():
        paths = [part / name for part in folders]
        if not all(path.exists() for path in paths):
            continue
        files = [read_tensors(p)[1] if name == OFFSETS else read_json(p) for p in paths]
        if name == HEADS and run.kind == "select":
            grids = [file["scores"] for file in files]
        took = [spent(path, script.removesuffix(".py")) for path in paths]
        found[script] = {key: files[0].get(key) for key in ("fingerprint", "data_hash")}
        found[script] |= KEPT[script](files, paths)
        found[script] |= {"seconds": round(sum(t for t, _ in took), 2), "device": took[0][1]}
    return found, grids


def of_training(files: list[dict], paths: list[Path]) -> dict:
    """Or of a selection. Settings without what the run's identity says already."""
    settings = {k: v for k, v in files[0]["settings"].items() if k not in ("heads", "by")}
    kept = {"settings": settings}
    if paths[0].name == OFFSETS:
        kept["offsets_hash"] = _one([hash_of(path) for path in paths])
    for key in ("heads", "val"):
        if key in files[0]:
            kept[key] = _one([file[key] for file in files])
    return kept | {key: files[0][key] for key in ("trained_values",) if key in files[0]}


def of_evaluation(files: list[dict], paths: list[Path]) -> dict:
    """Mean scores; the items' are of the tuned model, or of the base model where it was alone."""
    names = [PREDICTIONS if p.name == RESULTS else BASE_PREDICTIONS for p in paths]
    both = zip(paths, names, strict=True)
    lines = [line for path, name in both for _, line in read_jsonl(path.with_name(name))]
    whos, metrics = files[0]["scores"], list(files[0]["scores"]["base"])
    kept = {"n": _one([file["n"] for file in files])}
    kept |= {who: {m: mean([line[who][m] for line in lines]) for m in metrics} for who in whos}
    if "tuned" in whos:
        about = [file["adapters"]["tuned"] for file in files]
        kept["trained_values"] = about[0]["trained_values"]
        kept["offsets_hash"] = _one([each["offsets_hash"] for each in about])
    if len(files) == 1:
        more = ("always", "given", "groups")
        kept |= {key: files[0][key] for key in more if key in files[0]}
    who = "tuned" if "tuned" in whos else "base"
    if who == "base":  # of the data, and so the same for every model
        kept |= of_items(files, lines)
    return kept | {"hits": {m: pack([line[who][m] for line in lines]) for m in metrics}}


def of_items(files: list[dict], lines: list[dict]) -> dict:
    """Which items share something, a number for each, and what cheap rules score."""
    kept = {}
    if "unit" in lines[0]:
        numbers = {unit: i for i, unit in enumerate(dict.fromkeys(line["unit"] for line in lines))}
        kept["clusters"] = [numbers[line["unit"]] for line in lines]
    if "rules" in files[0]:
        scores = files[0]["rule_scores"].items()
        kept |= {"rules": files[0]["rules"], "rule_scores": {k: pack(v) for k, v in scores}}
    return kept


def of_text(files: list[dict], paths: list[Path]) -> dict:
    both = ("base", "tuned")
    return {"losses": {who: [round(loss, 6) for loss in files[0][who]] for who in both}}


KEPT = {"select_heads.py": of_training, "train.py": of_training}
KEPT |= {"eval.py": of_evaluation, "text_loss": of_text}


def spent(path: Path, script: str) -> tuple[float, str]:
    """(the seconds from the opened model to the file, without the time in which a killed script lay
    still; the device)."""
    lines = [line for _, line in read_jsonl(path.with_name("log.jsonl"))]
    lines = [line for line in lines if line["script"] == script]
    steps = ((a["time"], b["time"]) for a, b in itertools.pairwise(lines) if "device" not in b)
    last = max(path.stat().st_mtime - lines[-1]["time"], 0)
    return sum(b - a for a, b in steps) + last, lines[0]["device"]


def _one(values: list):
    """The value itself where there are no folds."""
    return values[0] if len(values) == 1 else values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="+", type=Path, help="of a line of --missing")
    parser.add_argument("--records", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    for folder in args.folder:
        run, _ = from_line(read_json(folder / CELL))
        found, grids = measured(run, folder)
        if not found:
            raise InputError(f"{folder}: nothing is in it to record; run its line first")
        Records(args.records).add(run, found, grids)
        print(f"recorded: {run.title}")


if __name__ == "__main__":
    errors.run(main)
