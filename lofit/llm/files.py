"""Reading a checkpoint's files: text, JSON and safetensors, with errors that name file and line."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lofit.errors import InputError

POINTER = b"version https://git-lfs"
# Files that a folder holds instead of a checkpoint to load -> what it is and what to do
OTHER_KINDS = {
    "adapter_config.json": (
        "a peft adapter, no model: name its base model, or merge the two with peft"
        " (merge_and_unload, then save_pretrained)"
    ),
    "consolidated.*": (
        "weights in Meta's own format; take the repository whose name ends in -hf, or convert them"
        " with transformers' convert_llama_weights_to_hf.py"
    ),
    "*.gguf": (
        "a GGUF file for llama.cpp; take the safetensors checkpoint that it was made from, or save"
        " it as one with transformers: from_pretrained(DIR, gguf_file=NAME)"
    ),
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth"),
        "pickled weights are never loaded; convert them once where you trust the file, e.g. with"
        " transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
    ),
}


def what_it_is(folder: Path) -> str | None:
    """Names a folder without a checkpoint to load for what it is; None if we do not know."""
    for pattern, kind in OTHER_KINDS.items():
        for path in sorted(folder.glob(pattern)):
            return f"{path}: {kind}"
    return None


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def unreadable(path: Path, what: str) -> InputError:
    """The error for a file that is not what its name says."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            what = "a git-LFS pointer, not the file itself; run `git lfs pull` in its folder"
    return InputError(f"{path}: {what}")


def read_text(path: Path, hint: str = "") -> str:
    """Read a UTF-8 text file. Raises InputError; `hint` is added where there is no such file."""
    try:
        return path.read_text(encoding="utf-8-sig")
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
    text = read_text(path)
    if text.startswith(POINTER.decode()):
        raise unreadable(path, "")
    value = parse_json(text, str(path), lines=True)
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
        what = f"not a whole safetensors file ({error}); fetch it again"
        raise unreadable(path, what) if is_file(path) else InputError(f"{path}: {what}") from None


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """`save_file` with the permissions that any new file has; its own are for the owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
