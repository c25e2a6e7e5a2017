"""Reading and writing files: whole or not at all, and errors that name file and line."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from lofit.errors import InputError, held_back
from lofit.llm.files import open_tensors, parse_json, read_text, save_tensors

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows has no such locks: two runs in one folder are not noticed there

_HELD: dict[Path, int] = {}  # folders that this process has locked
Write = Callable[[Path], object]  # fills a file of this name
IN_DATA = "; --data names the folder above it"


def is_first() -> bool:
    """Whether this process prints and writes: under torchrun rank 0 alone, else always."""
    return not dist.is_initialized() or dist.get_rank() == 0


def write_atomic(path: Path, write: Write, beside: dict[Path, Write | None] | None = None) -> None:
    """Call `write(temporary)` and rename the result to `path`; an interrupted write leaves nothing.
    Under torchrun only rank 0 writes.

    beside: files that belong to it; None for one that is to be deleted. `path` is removed first and
    renamed last: if it exists, all companions belong to the same write. Raises InputError if the
    folder cannot be written.
    """
    if not is_first():
        return
    writes = {**(beside or {}), path: write}
    partials = {p: p.with_name(f".{p.name}.{os.getpid()}.partial") for p in writes}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, fill in writes.items():
            if fill:
                fill(partials[file])
                with partials[file].open("rb") as written:
                    os.fsync(written.fileno())  # on disk before it takes the name
        with held_back():
            if beside:
                path.unlink(missing_ok=True)
            for file, fill in writes.items():
                partials[file].replace(file) if fill else file.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({why})") from None
    finally:
        for partial in partials.values():
            if partial.parent.is_dir():
                partial.unlink(missing_ok=True)


def sweep_partials(folder: Path) -> None:
    """Remove what processes that were killed left half-written in a folder."""
    for partial in folder.glob(".*.partial"):
        pid = partial.name.split(".")[-2]
        if pid.isdecimal() and not _runs(int(pid)):
            partial.unlink(missing_ok=True)


def lock_folder(folder: Path) -> None:
    """Hold a folder until this process ends, however it ends. InputError if another holds it."""
    key = folder.resolve()
    if key in _HELD:
        return
    if fcntl is None:  # Windows
        return
    handle = os.open(key, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{folder}: another process writes to it; wait for it, or choose another by --run"
        ) from None
    _HELD[key] = handle


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def as_text(text: str) -> Write:
    """For `write_atomic`: UTF-8. Half of a surrogate pair, which UTF-8 has no bytes for, becomes
    its escape, which in JSON means the same."""
    return lambda path: path.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def as_json(value: object) -> Write:
    """For `write_atomic`: indented JSON; lists of plain numbers stay on one line."""
    return as_text(_json(value) + "\n")


def as_tensors(tensors: dict[str, torch.Tensor], info: dict) -> Write:
    """For `write_atomic`: safetensors, with `info` as JSON under the header's key "lofit"; its only
    key, for several come in any order and equal contents would not be equal bytes."""
    return lambda path: save_tensors(path, tensors, {"lofit": json.dumps(info)})


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, as_text(text))


def write_splits(folder: Path, splits: dict[str, list[dict]]) -> None:
    """Write each split to SPLIT.jsonl; the last one exists only with the others of one write."""
    texts = {
        folder / f"{split}.jsonl": "".join(
            json.dumps(line, ensure_ascii=False) + "\n" for line in lines
        )
        for split, lines in splits.items()
    }
    *beside, last = texts
    write_atomic(last, as_text(texts[last]), {path: as_text(texts[path]) for path in beside})


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_atomic(path, as_json(value))


def _json(value: object, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        items = (
            f"{inner}{json.dumps(k, ensure_ascii=False)}: {_json(v, inner)}"
            for k, v in value.items()
        )
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    return json.dumps(value, ensure_ascii=False)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """Write tensors atomically."""
    write_atomic(path, as_tensors(tensors, info))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Inverse of `as_tensors`. Raises InputError if missing, damaged or not ours."""
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if "lofit" not in metadata:
            raise InputError(f"{path}: not written by train.py (no 'lofit' entry in its header)")
        info = parse_json(metadata["lofit"], f"{path}, 'lofit' in its header")
        if not isinstance(info, dict):
            raise InputError(f"{path}: 'lofit' in its header: expected a JSON object")
        return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118


def read_json_list(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE, item N", object) of a JSON list. InputError if malformed or empty."""
    items = parse_json(read_text(path, IN_DATA), str(path), lines=True)
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: expected a JSON list of objects, at least one")
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise InputError(f"{path}, item {number}: expected a JSON object")
        yield f"{path}, item {number}", item


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("FILE, line N", row) of a CSV file with these columns. InputError if malformed."""
    reader = csv.DictReader(io.StringIO(read_text(path, IN_DATA), newline=""))
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
    except csv.Error as error:
        raise InputError(f"{path}, line 1: not valid CSV ({error})") from None
    if missing:
        raise InputError(f"{path}, line 1: lacks the columns {', '.join(missing)}")
    empty = True
    for row in _rows(path, reader):
        empty, where = False, f"{path}, line {reader.line_num}"
        if any(row[column] is None for column in columns):
            raise InputError(f"{where}: expected {len(reader.fieldnames)} cells")
        yield where, row
    if empty:
        raise InputError(f"{path}: the split is empty; expected one question a line")


def _rows(path: Path, reader: csv.DictReader) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE, line N", object) per non-blank line. InputError if malformed or empty."""
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte-order mark is no part of line 1
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                empty = False
                value = parse_json(line, where)
                if not isinstance(value, dict):
                    raise InputError(f"{where}: expected a JSON object")
                yield where, value
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{IN_DATA}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable ({error})") from None
    if empty:
        raise InputError(f"{path}: the split is empty; expected one JSON object a line")
