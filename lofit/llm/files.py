"""Reading a checkpoint's files: text, JSON and safetensors, with errors that name file and line."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lofit.errors import InputError


def read_text(path: Path, hint: str = "") -> str:
    """Read a UTF-8 text file. Raises InputError; `hint` is added where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable ({error})") from None


def parse_json(text: str, where: str, lines: bool = False) -> object:
    """The value of a JSON text. InputError that names `where` (and the line in it, of several)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{where}, line {error.lineno}" if lines else where
        raise InputError(f"{at}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{where}: not usable JSON (nested too deep)") from None
    except ValueError:  # Python's bound on the digits of a whole number
        raise InputError(f"{where}: not usable JSON (a number has too many digits)") from None


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError that names the file and line."""
    value = parse_json(read_text(path), str(path), lines=True)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def open_tensors(path: Path, device: str = "cpu") -> safe_open:
    """`safe_open` with errors that say what to do."""
    try:
        return safe_open(path, framework="pt", device=device)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from None


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """`save_file` with the permissions that any new file has; its own are for the owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
