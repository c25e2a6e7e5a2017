"""A tuned model by the name of its offsets alone: they say which base model is theirs."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lofit.errors import InputError, warn
from lofit.files import hash_of, read_json, read_jsonl, read_tensors, reading
from lofit.llm.checkpoint import load_model
from lofit.llm.hub import find_folder, local_folder
from lofit.llm.model import CausalLM
from lofit.run.files import (
    PREDICTIONS,
    RESULTS,
    WORDS,
    check_made_for,
    find_edits,
    load_offsets,
)


@dataclass(frozen=True)
class Tuned:
    """model: the base, with the edits attached; info: what their file, path, says of itself."""

    model: CausalLM
    info: dict
    path: Path

    @property
    def base(self) -> str:
        """The name of the base model."""
        return self.model.source.name

    @property
    def method(self) -> str:
        return self.info.get("method") or self.info["settings"].get("method", "lofit")

    @property
    def folder_to_write(self) -> Path:
        """Of what is found out about a run: its folder; the hub's cache belongs to the hub, so for
        an adapter in it the working directory."""
        folder = self.path.parent
        return Path() if "snapshots" in folder.resolve().parts else folder


def open_tuned(
    name: str, base: str | None = None, dtype: torch.dtype | str | None = None, device: str = "cpu"
) -> Tuned:
    """The edits of a file, run folder, adapter folder or hub id, on their base model.

    base: where it is now, if not where the file says; dtype: of its weights, by default that of
    the run. InputError if the base is missing or another one.
    """
    path = find_edits(name)
    if path.name == "config.json":  # a checkpoint of the paper's own code is its own base
        info = {"model": str(path.parent), "settings": {}}
    else:
        _, info = read_tensors(path)
        check_made_for(path, info, {}, "train.py", keys=())
    with reading(path):
        recorded, revision = str(info["model"]), info.get("revision")
        dtype = dtype or info["settings"].get("dtype", "float32")
    if base is None and revision and not local_folder(recorded):  # the very commit
        recorded = f"{recorded.partition('@')[0]}@{revision}"
    try:
        find_folder(base or recorded)
    except InputError as error:
        raise InputError(f"{name}: its base model: {error}; --model says where it is") from None
    model = load_model(base or recorded, dtype, device)
    mine = model.source.fingerprint
    if info.get("fingerprint", mine) != mine:
        raise InputError(
            f"{name}: made with {info['model']} ({info['fingerprint']}), but {base or recorded} has"
            f" other weights ({mine}); --model names the folder of the very same ones"
        )
    if info["settings"].get("quantize") == "nf4":
        warn(f"{name}: trained with quantize nf4; here the base model's weights are not rounded")
    return Tuned(model, load_offsets(path, model), path)


def read_results(tuned: Tuned) -> tuple[dict | None, list[dict]]:
    """(results.json, predictions.jsonl) of these offsets as they are now, on what they were trained
    for; (None, []) if they were not evaluated.

    They lie in the run's folder, or beside it where eval.py --offsets compared several: there the
    offsets have another label, which becomes "tuned" here.
    """
    folder, mine = tuned.path.absolute().parent, hash_of(tuned.path)
    for place in (folder, folder.with_name(f"{tuned.info.get('task')}-offsets")):
        path = place / RESULTS
        found = read_json(path) if path.exists() else {}
        with reading(path):
            for label, about in found.get("adapters", {}).items():
                same = all(found.get(key) == tuned.info.get(key) for key in WORDS)
                if about["offsets_hash"] == mine and same:
                    scores, differences = found["scores"], found["differences"]
                    found["scores"] = {"base": scores["base"], "tuned": scores[label]}
                    found["differences"] = {"tuned": differences[label]}
                    path = place / PREDICTIONS
                    lines = read_jsonl(path) if path.exists() else ()
                    return found, [line | {"tuned": line[label]} for _, line in lines]
    return None, []
