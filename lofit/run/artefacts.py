"""What the steps hand to one another: heads.json and offsets.safetensors, read strictly."""

import hashlib
import json
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.files import Write, as_json, as_tensors, as_text, read_jsonl, read_tensors, write_atomic
from lofit.heads import Head, attach_offsets, check_heads
from lofit.llm.files import read_json
from lofit.llm.model import CausalLM

OFFSETS, ADAPTER_CONFIG = "offsets.safetensors", "lofit_config.json"  # an adapter's two files
HEADS, PICTURE = "heads.json", "heads.png"
RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
METADATA_TYPES = {
    "model": str, "fingerprint": str, "revision": str, "task": str, "fold": int, "chat": bool,
    "plain": bool, "data": str, "data_hash": str, "heads_hash": str, "seed": int, "settings": dict,
    "val": dict, "method": str, "trained_values": int,
}  # fmt: skip


def results_files(split: str, base_only: bool) -> tuple[str, str]:
    """Names of the results and of the predictions. Those of other splits than test, and of the base
    model alone, have names of their own: they never replace a tuned model's test results."""
    suffix = ("" if split == "test" else f"-{split}") + ("-base" if base_only else "")
    return f"results{suffix}.json", f"predictions{suffix}.jsonl"


def hash_of_file(path: Path) -> str | None:
    """16 hex digits over a file's bytes; None if there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def hash_of_text(value: object) -> str:
    """16 hex digits over what a value prints as."""
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def save_heads(
    path: Path, heads: list[Head], scores: torch.Tensor, info: dict, picture: Write | None = None
) -> None:
    """Write heads.json: `info` (model, task, seed, settings), heads, scores [layer][head]; and the
    picture beside it. InputError if a score is not finite."""
    if not scores.isfinite().all():
        raise InputError(
            f"{path}: not written: a head's score is not finite; try --dtype float32, or a smaller"
            " --lr"
        )
    content = as_json(info | {"heads": heads, "scores": scores.tolist()})
    write_atomic(path, content, {path.with_name(PICTURE): picture})


def find_heads(path: Path, fold: int | None) -> Path:
    """heads.json of a run folder, of a fold where it has folders of folds; a file as it is."""
    if not path.is_dir():
        return path
    of_fold = path / f"fold{fold}"
    return (of_fold if fold is not None and of_fold.is_dir() else path) / HEADS


def other_task(name: str, folder: Path, fold: int | None) -> Path:
    """heads.json of another task's run: a folder, or the task's name if it lies beside the run
    `folder` (that of all folds). Of a run in folds the same one, or the first. InputError if there
    is none."""
    other = Path(name) if Path(name).is_dir() else folder.parent / name
    path = find_heads(other, fold or 0)
    if not path.exists():
        raise InputError(
            f"--by task:{name}: {path}: no such file; run select_heads.py --task"
            f" {Path(name).name} first, or name a run folder"
        )
    return path


def load_heads(path: Path, model: CausalLM) -> tuple[list[Head], torch.Tensor]:
    """Read heads.json -> (heads descending, scores [layer, head]). InputError on a mismatch."""
    found = read_json(path)
    check_base(model, found, path)
    try:
        heads = [(layer, head) for layer, head in found["heads"]]
        if not all(type(number) is int for head in heads for number in head):
            raise TypeError("heads are pairs of whole numbers")
        scores = torch.tensor(found["scores"], dtype=torch.float32)
        config = model.config
        if scores.shape != (config.num_hidden_layers, config.num_attention_heads):
            raise ValueError(f"scores {list(scores.shape)}: expected one for each head")
        if not scores.isfinite().all():
            raise ValueError("a score is not finite")
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: 'heads' or 'scores' is missing or malformed ({error})") from None
    check_heads(model, heads, str(path))
    return heads, scores


def save_offsets(path: Path, heads: list[Head], offsets: torch.Tensor, info: dict) -> None:
    """Write offsets.safetensors: heads [K, 2] int64, offsets [K, head_dim] fp32, and `info`; the
    latter also as lofit_config.json beside it, for whoever reads no safetensors headers."""
    tensors = {"heads": torch.tensor(heads), "offsets": offsets.contiguous()}
    config = as_json({"method": "LoFiT"} | info | {"heads": heads})
    write_atomic(path, as_tensors(tensors, info), {path.with_name(ADAPTER_CONFIG): config})


def save_results(
    folder: Path, results: dict, lines: list[dict], names: tuple[str, str] = (RESULTS, PREDICTIONS)
) -> None:
    """Write results and, beside them, predictions: a line for each item. names: see
    `results_files`. Writing one fold deletes the joint results of both."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    beside = {folder / names[1]: as_text(text)}
    if results["fold"] is not None:
        beside[folder.parent / names[0]] = None
    write_atomic(folder / names[0], as_json(results), beside)


def hash_of_offsets(heads: list[Head], offsets: torch.Tensor) -> str:
    """16 hex digits over heads and offsets: results say by it which offsets they are of."""
    numbers = torch.tensor(heads).numpy().tobytes() + offsets.float().cpu().numpy().tobytes()
    return hashlib.sha256(numbers).hexdigest()[:16]


def check_metadata(info: dict, path: Path, needed: tuple[str, ...] = ()) -> None:
    """InputError unless what an adapter says of itself has the types that readers expect."""
    for key, kind in METADATA_TYPES.items():
        value = info.get(key)
        if (value is None and key in needed) or (value is not None and type(value) is not kind):
            raise InputError(
                f"{path}: {key} is {str(value)[:60]!r}; expected a {kind.__name__}; was the file"
                " written by train.py?"
            )


def read_offsets(path: Path) -> tuple[list[Head], torch.Tensor, dict]:
    """Inverse of `save_offsets`, from the safetensors file alone. InputError if malformed."""
    tensors, info = read_tensors(path)
    check_metadata(info, path)
    if "method" in info:
        raise InputError(
            f"{path}: made by train.py --method {info['method']}; expected LoFiT's offsets"
        )
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    heads, offsets = tensors.get("heads"), tensors.get("offsets")
    if len(tensors) != 2 or heads is None or offsets is None or offsets.dim() != 2:
        raise InputError(f"{path}: expected heads [K, 2] and offsets [K, head_dim], found {shapes}")
    if heads.shape != (len(offsets), 2):
        raise InputError(f"{path}: expected one (layer, head) for each offset, found {shapes}")
    if heads.dtype != torch.int64 or offsets.dtype != torch.float32:
        raise InputError(
            f"{path}: expected heads in int64 and offsets in float32, found {heads.dtype} and"
            f" {offsets.dtype}"
        )
    if not offsets.isfinite().all():
        raise InputError(f"{path}: an offset is not finite; train again with a smaller --lr")
    return [(layer, head) for layer, head in heads.tolist()], offsets, info


def load_offsets(path: Path, model: CausalLM) -> tuple[list[Head], dict]:
    """Attach the offsets of a file to the model; returns its heads and `info`. InputError on a
    mismatch, with the model untouched. Another method's file is attached too; it has no heads."""
    tensors, info = read_tensors(Path(path))
    check_metadata(info, path)
    if "method" in info:
        from lofit.compare.stored import attach_stored

        check_base(model, info, path)
        attach_stored(model, tensors, info)
        return [], info
    heads, offsets, info = read_offsets(Path(path))
    check_base(model, info, path)
    attach_offsets(model, heads, offsets)
    return heads, info


def check_base(model: CausalLM, info: dict, path: Path) -> None:
    """Raise InputError unless `info` was made with the weights of this model."""
    if info.get("fingerprint") != model.source.fingerprint:
        raise InputError(
            f"{path}: made with {info.get('model')} (fingerprint {info.get('fingerprint')}), but"
            f" this is {model.source.name} ({model.source.fingerprint}); name that model with"
            " --model, or run the step before again"
        )


def check_same_run(path: Path, found: dict, mine: dict, script: str) -> None:
    """InputError unless a file of a run folder was made for the same questions: `script` is what
    makes it again. mine: `Session.info`."""
    for key in ("task", "fold", "chat", "data_hash"):
        if key in found and found[key] != mine[key]:
            theirs, ours = (f"{info.get('data')}" for info in (found, mine))
            if key != "data_hash":
                theirs, ours = f"{key} {found[key]}", f"{key} {mine[key]}"
            elif theirs == ours:
                ours += " as it is now"
            raise InputError(
                f"{path}: made for {theirs}, but this run is for {ours}; run {script} again with"
                " the same flags, or choose another folder by --run"
            )


def check_heads_of(path: Path, trained: dict) -> None:
    """InputError if heads.json beside these offsets is not the one that they were trained for."""
    made_from = trained.get("heads_hash")
    if isinstance(made_from, str) and hash_of_file(path.with_name(HEADS)) not in (made_from, None):
        raise InputError(
            f"{path}: trained before {path.with_name(HEADS)} was written, for other heads; run"
            f" train.py again, or evaluate these all the same by --offsets {path.parent}"
        )


def read_base(folder: Path, mine: dict, prompts: list[str]) -> list[dict]:
    """The base model's scores of each item out of another run's results: a study asks it once.

    mine: `Session.info` and the split of the run that wants them. InputError unless the same
    weights were asked the same questions in the same way.
    """
    alone = results_files(mine["split"], True)
    names = alone if (folder / alone[0]).exists() else results_files(mine["split"], False)
    path = folder / names[0]
    if not path.exists():
        raise InputError(
            f"{path}: no such file; evaluate that run on the {mine['split']} split first, or leave"
            " --base-from out"
        )
    found = read_json(path)
    for key in ("fingerprint", "task", "fold", "chat", "plain", "split"):
        if found.get(key) != mine[key]:
            raise InputError(
                f"{path}: {key} {found.get(key)}, asked for {mine[key]}; leave --base-from out"
            )
    lines = [line for _, line in read_jsonl(folder / names[1])]
    asked, dtype = [line.get("prompt") for line in lines], found.get("settings", {}).get("dtype")
    if (
        asked != prompts
        or dtype != mine["settings"]["dtype"]
        or not all("base" in line for line in lines)
    ):
        raise InputError(
            f"{folder}: other questions, or another --dtype ({dtype}); leave --base-from out"
        )
    return [line["base"] for line in lines]
