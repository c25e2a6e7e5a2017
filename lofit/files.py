"""Reading and writing files: written whole or not at all, read with errors that name the line."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lofit.errors import InputError

POINTER = "version https://git-lfs"  # how a git-LFS file begins that was not fetched
IN_DATA = "; --data names the folder above it"
WRITES = True  # False in all but the first process of torchrun


def write(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it: a killed process leaves the old file or
    the new one, never half of one."""
    if not WRITES:
        return
    # half of a surrogate pair has no UTF-8; in JSON its escape means the same
    data = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())  # on disk before it takes the name
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if partial.exists():
            partial.unlink()


def append(path: Path, record: dict) -> None:
    """Add a record as a whole line, so that a killed run leaves a readable log."""
    if WRITES:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def write_json(path: Path, value: dict) -> None:
    """One key a line, so that a list of a thousand scores is one line and not a thousand."""
    lines = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
    write(path, "{\n" + ",\n".join(lines) + "\n}\n")


def write_jsonl(path: Path, lines: list[dict]) -> None:
    write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """safetensors, with `info` as JSON under the header's key "lofit"."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write(path, save(tensors, {"lofit": json.dumps(info)}))


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Inside, what a malformed file makes Python raise becomes an InputError that names it; one
    that does not name it yet does so too."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: missing or malformed: {what}") from None


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of `write_tensors`."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = (file.metadata() or {}).get("lofit")
    if info is None:
        raise InputError(f"{path}: not written by train.py (no 'lofit' in its header)")
    return tensors, parse_json(info, f"{path}, 'lofit' in its header", dict)


def open_tensors(path: Path) -> safe_open:
    """`safe_open` with errors that say what to do."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {_why_unreadable(path, error)}") from None


def _why_unreadable(path: Path, error: Exception) -> str:
    if path.is_file() and path.read_bytes()[: len(POINTER)] == POINTER.encode():
        return "a git-LFS pointer, not the file itself; run `git lfs pull` in its folder"
    return f"not readable ({error}); is it whole? fetch it again"


def read_text(path: Path, hint: str = "") -> str:
    """A UTF-8 file, without the byte-order mark that some editors put in front. hint: for a file
    that is not there."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {_why_unreadable(path, error)}") from None


def parse_json(text: str, where: str, kind: type = object):
    """The value of a JSON text, of a kind (dict, list)."""
    if text.startswith(POINTER):
        raise InputError(f"{where}: a git-LFS pointer; run `git lfs pull` in its folder")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        found = {"dict": "an object", "list": "a list"}[kind.__name__]
        raise InputError(f"{where}: expected {found}, found {str(value)[:60]!r}")
    return value


def read_json(path: Path, kind: type = dict):
    """A JSON object, or a list with kind=list."""
    return parse_json(read_text(path), str(path), kind)


def read_json_list(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, item N", object) of each item of a JSON list."""
    for number, item in enumerate(parse_json(read_text(path, IN_DATA), str(path), list)):
        if not isinstance(item, dict):
            raise InputError(f"{path}, item {number}: expected an object")
        yield f"{path}, item {number}", item


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", object) of each line that is not blank."""
    # not splitlines(), which also splits at characters that a JSON text may hold
    for number, line in enumerate(read_text(path, IN_DATA).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, dict)


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE, line N", row by column) of each line of a CSV file but the first, which names the
    columns; a cell that is missing is None."""
    reader = csv.DictReader(io.StringIO(read_text(path, IN_DATA), newline=""))
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def hash_of(path: Path) -> str | None:
    """16 hex digits over a file's bytes, enough to see that two are not the same; None if there is
    no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
