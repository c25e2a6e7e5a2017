"""What the steps hand to one another: heads.json, offsets.safetensors and results.json, and whether
they belong to this model and these questions. Each carries `Run.info`, so that it says what it is
of."""

from dataclasses import asdict
from operator import index
from pathlib import Path

import torch

from lofit import files
from lofit.errors import InputError, warn
from lofit.files import (
    parse_json,
    read_tensors,
    read_text,
    reading,
    write_json,
    write_jsonl,
    write_tensors,
)
from lofit.heads import (
    Head,
    attach_offsets,
    attached_offsets,
    attention_layers,
    check_heads,
    head_grid,
)
from lofit.llm.hub import find_folder
from lofit.llm.model import CausalLM
from lofit.tasks import Example

HEADS, OFFSETS, RESULTS, PREDICTIONS = (
    "heads.json", "offsets.safetensors", "results.json", "predictions.jsonl",
)  # fmt: skip
VERSION = 2  # of these files
WORDS = {"fingerprint": "model", "data_hash": "data", "chat": "chat"}  # key -> what it stands for


def check_made_for(
    path: Path, found: dict, mine: dict, script: str, keys: tuple[str, ...] = tuple(WORDS)
) -> None:
    """InputError unless a file was made by this version, for this base model and, with all keys,
    for the same questions. script: what makes it again. Not the names of folders decide, but what
    is in them."""
    if found.get("version") != VERSION:
        raise InputError(
            f"{path}: of another version of this program ({found.get('version')}, expected"
            f" {VERSION}); run {script} again"
        )
    for key in keys:
        if found.get(key) != mine[key]:
            word = WORDS[key]
            theirs, ours = (
                f"{info.get(word)}" + (f" ({info.get(key)})" if word != key else "")
                for info in (found, mine)
            )
            raise InputError(
                f"{path}: made for {word} {theirs}, but this run is for {ours}; run {script} again"
                " with the same flags, or choose another folder by --run"
            )


def check_folds(path: Path, found: dict, mine: dict) -> None:
    """InputError for a file of TruthfulQA's other fold: it was made on questions that are tested
    here."""
    if {found.get("task"), mine["task"]} == {"truthfulqa-0", "truthfulqa-1"}:
        raise InputError(f"{path}: {found['task']} trains on questions that {mine['task']} tests")


def warn_of_settings(path: Path, found: dict, mine: dict, then: str, now: str, *flags: str) -> None:
    """Warn where a file was made with other settings than it is used with."""
    for flag in flags:
        theirs, ours = ((info | info["settings"]).get(flag) for info in (found, mine))
        if found["settings"] and (theirs or None) != (ours or None):  # not told: not set
            warn(f"{path}: {then} with {flag} {theirs}, {now} with {flag} {ours}")


def save_heads(path: Path, heads: list[Head], scores: torch.Tensor, info: dict) -> None:
    """scores: [layer][head] of all heads, so that another K needs no second run."""
    if not scores.isfinite().all():
        raise InputError(
            f"{path}: not written: a head's score is not finite; try --dtype float32, or a smaller"
            " --lr"
        )
    write_json(path, info | {"heads": heads, "scores": scores.tolist()})


def load_heads(path: Path, model: CausalLM) -> tuple[list[Head], torch.Tensor | None, dict]:
    """(heads descending, scores [layer, head], info) of select_heads.py's file; of your own list
    [[layer, head], ...] the heads alone, None and {}."""
    text = read_text(path, "; run select_heads.py first, or name a file")
    found = parse_json(text, str(path))
    found = {"heads": found} if isinstance(found, list) else found
    with reading(path):
        heads = [(index(layer), index(head)) for layer, head in found["heads"]]
        scores = found.get("scores")
        if scores is not None:
            scores = torch.tensor(scores, dtype=torch.float32)
            if scores.shape != head_grid(model):
                raise ValueError("scores: expected one for each head of the model")
    check_heads(model, heads, str(path))
    return heads, scores, found if set(found) > {"heads"} else {}


def edit_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """What is attached now, by name: LoFiT's heads [K, 2] and offsets [K, head_dim], or the
    parameters of a baseline's edits."""
    heads, offsets = attached_offsets(model)
    if heads:
        return {"heads": torch.tensor(heads), "offsets": offsets}
    return {
        f"layers.{layer}.{name}": parameter.detach().cpu()
        for layer, attention in enumerate(attention_layers(model))
        for name, parameter in attention.head_out.named_parameters()
    }


def save_edits(path: Path, model: CausalLM, info: dict) -> None:
    """Write what is attached, and how many values it has."""
    tensors = edit_tensors(model)
    n = sum(tensor.numel() for name, tensor in tensors.items() if name != "heads")
    write_tensors(path, tensors, info | {"trained_values": n})


def save_offsets(path: str | Path, model: CausalLM) -> None:
    """Write the attached edits, for `load_offsets` and eval.py --offsets. path: a file, or a folder
    for an offsets.safetensors."""
    path, source = Path(path), model.source
    path = path if path.suffix == ".safetensors" else path / OFFSETS
    info = {"version": VERSION, "model": source.name, "fingerprint": source.fingerprint}
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    info |= {"revision": source.revision, "settings": {"dtype": dtype}}
    save_edits(path, model, info)


def load_offsets(name: str | Path, model: CausalLM) -> dict:
    """Attach the edits of a file, a run folder, an adapter folder or a hub id to the model; returns
    what the file says of itself. InputError on a mismatch, with the model as it was."""
    path = find_edits(name)
    if path.name == "config.json":  # a checkpoint of the paper's own code
        from lofit.run.released import attach_released

        return attach_released(path.parent, model)
    tensors, info = read_tensors(path)
    mine = {"fingerprint": model.source.fingerprint, "model": model.source.name}
    check_made_for(path, info, mine, "train.py", keys=("fingerprint",))
    with reading(path):
        for key, tensor in tensors.items():  # the model would answer all the same, and score 0
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {key} is not finite; train again with a smaller --lr")
        if "method" in info:
            from lofit.compare.baselines import attach_edits

            attach_edits(model, info["method"], tensors)
            return info
        heads = [(layer, head) for layer, head in tensors["heads"].tolist()]
        attach_offsets(model, heads, tensors["offsets"])
    return info


def find_edits(name: str | Path) -> Path:
    """The file of edits that a name stands for: a file, a run or adapter folder, a hub id; of a
    checkpoint with the paper's own offsets its config.json."""
    if Path(name).is_file():
        return Path(name)
    folder = find_folder(name)
    for path in (folder / OFFSETS, folder / "config.json"):
        if path.exists():
            return path
    what = "only step 1 was run" if (folder / HEADS).exists() else "no such file"
    raise InputError(f"{folder / OFFSETS}: {what}; run train.py first, or use --base-only")


def save_results(folder: Path, suffix: str, results: dict, lines: list[dict]) -> str:
    """Write results.json and predictions.jsonl. suffix: of their names, where they are of another
    split, or of the base model alone. Returns what to print."""
    results_file, predictions = (
        folder / name.replace(".", f"{suffix}.") for name in (RESULTS, PREDICTIONS)
    )
    # the results go first and come last: where they are, the predictions are of the same evaluation
    if files.WRITES:  # under torchrun a slower process would remove what the first has written
        results_file.unlink(missing_ok=True)
    write_jsonl(predictions, lines)
    write_json(results_file, results)
    return f"-> {results_file}, {predictions.name}"


def as_line(example: Example, rows: dict[str, dict]) -> dict:
    """An item of predictions.jsonl: what was asked, and each model's answer and scores."""
    asked = {k: v for k, v in asdict(example).items() if v and k not in ("where", "rules")}
    asked |= {} if example.value is None else {"value": example.value}  # 0 is an answer
    return asked | rows
