"""Trained offsets by name: a run, an adapter folder, a hub id, a checkpoint of the paper's."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.heads import Head, attach_offsets, check_heads
from lofit.llm.checkpoint import (
    DTYPES,
    assemble,
    find_folder,
    stored_tensors,
    text_name,
    weight_files,
)
from lofit.llm.config import ModelConfig
from lofit.llm.files import open_tensors, read_json
from lofit.llm.model import CausalLM
from lofit.run.artefacts import (
    OFFSETS,
    RESULTS,
    check_base,
    check_metadata,
    hash_of_offsets,
    read_offsets,
)

# Beside a model's own tensors in the paper's released checkpoints: A and v of each head.
RELEASED = re.compile(r"model\.layers\.(\d+)\.self_attn\.attn_(A|v)\.(\d+)$")


@dataclass(frozen=True)
class Adapter:
    """heads: K (layer, head); offsets: [K, head_dim] fp32; info: what the run recorded, with
    fingerprint None for a released checkpoint, which is its own base; folder: where they lie."""

    heads: list[Head]
    offsets: torch.Tensor
    info: dict
    folder: Path

    def results(self) -> dict | None:
        """What eval.py wrote about these offsets and no others; None if it did not."""
        own = hash_of_offsets(self.heads, self.offsets)
        return matching_results(self.folder / RESULTS, self.info.get("fingerprint"), own)

    def folder_to_write(self) -> Path:
        """Where to write what is found out about a run: its folder, but for one in the hub's cache,
        which belongs to the hub, the working directory."""
        return Path() if "snapshots" in self.folder.resolve().parts else self.folder


def matching_results(
    path: Path, fingerprint: str | None, offsets_hash: str | list[str]
) -> dict | None:
    """Results of eval.py if they are of these offsets (of all folds: a hash for each) on this base
    model; else None. InputError if malformed."""
    found = read_json(path) if path.exists() else {}
    same = found.get("fingerprint") == fingerprint and found.get("offsets_hash") == offsets_hash
    if not same or "tuned" not in found:
        return None
    from lofit.run.summary import results_table

    try:
        results_table(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: malformed ({error!r}); run eval.py again") from None
    return found


def find_offsets(name: str | Path, fold: int | None = None) -> Path:
    """The file of offsets that a folder or hub id holds, of a fold where it has folders of folds; a
    file as it is. InputError if there is none."""
    if Path(name).is_file():
        return Path(name)
    folder = find_folder(name, wanted=(f"*{OFFSETS}",))  # in folders of folds too
    for path in (folder / f"fold{fold}" / OFFSETS, folder / OFFSETS):
        if path.exists():
            return path
    if (folder / "fold0").is_dir():
        raise InputError(f"{name}: a run of several folds; name one of them, {name}/fold0, ...")
    if (folder / "heads.json").exists():
        raise InputError(
            f"{name}: scales alone (step 1), no {OFFSETS}: they choose heads and are no part of a"
            " tuned model, nor can a bias express a scale; run train.py first"
        )
    raise InputError(f"{name}: no {OFFSETS} in it; expected a run folder or an adapter")


def open_adapter(name: str) -> Adapter:
    """The offsets of a run folder, an adapter folder or hub id, or a checkpoint that the paper
    released. InputError if there are none."""
    folder = find_folder(name)
    if (folder / "config.json").exists() and not (folder / OFFSETS).exists():
        released = read_released(weight_files(folder))
        if released is None:
            raise InputError(f"{name}: a model without offsets; expected a run folder, an adapter")
        return Adapter(*released, {"model": name, "revision": None, "fingerprint": None}, folder)
    path = find_offsets(folder)
    heads, offsets, info = read_offsets(path)
    check_metadata(info, path, needed=("model", "fingerprint"))
    return Adapter(heads, offsets, info, path.parent)


def open_tuned(
    adapter: Adapter,
    name: str,
    model: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> CausalLM:
    """The base model of an adapter with its offsets attached.

    name: the adapter's; model: where its base is, if not where the adapter says; dtype: of the
    base's weights, by default as recorded. InputError if the base is missing or another one.
    """
    recorded = DTYPES.get((adapter.info.get("settings") or {}).get("dtype"), torch.float32)
    dtype = dtype or recorded
    base = model or adapter.info["model"]
    revision = None if Path(base).is_dir() else adapter.info.get("revision")
    found = load_tuned(base, revision, dtype, device)
    if adapter.info["fingerprint"] is not None:
        check_base(found, adapter.info, Path(name))
    check_heads(found, adapter.heads, name)
    attach_offsets(found, adapter.heads, adapter.offsets)
    return found


def read_released(paths: list[Path]) -> tuple[list[Head], torch.Tensor] | None:
    """(heads, offsets [K, head_dim] fp32) of a checkpoint that the paper released: the heads whose
    attn_v is not zero. None for any other. InputError if an attn_A, a scale, is not zero."""
    offsets: dict[Head, torch.Tensor] = {}
    for key, tensor in stored_tensors(paths, RELEASED.match):
        layer, kind, head = RELEASED.match(key).groups()
        if not tensor.any():
            continue
        if kind == "A":
            raise InputError(
                f"{paths[0].parent}: {key} is not zero; expected offsets (attn_v) alone: a scale"
                " (step 1) is no part of a tuned model, nor can a bias express it"
            )
        offsets[int(layer), int(head)] = tensor.float()
    heads = sorted(offsets)
    return (heads, torch.stack([offsets[head] for head in heads])) if heads else None


def base_name(key: str) -> str | None:
    """`text_name`, but None for the A and v of a released checkpoint as well."""
    return None if RELEASED.match(key) else text_name(key)


def load_tuned(
    name: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shards=None,
) -> CausalLM:
    """`load_model`; but a checkpoint that the paper released becomes its base model, with its
    offsets attached. shards: as in `assemble`. InputError as there."""
    folder = find_folder(name, revision)
    config = ModelConfig.from_file(folder / "config.json")
    paths = weight_files(folder)
    released = read_released(paths)
    if released:
        config = replace(config, vocab_size=_rows_of_embedding(paths) or config.vocab_size)
    model = assemble(str(name), revision, folder, config, base_name, dtype, device, shards)
    if released:
        attach_offsets(model, *released)
    return model.requires_grad_(False)


def _rows_of_embedding(paths: list[Path]) -> int | None:
    """The paper's code adds one for padding, beyond config.json's vocab_size."""
    for path in paths:
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118
                if text_name(key) == "model.embed_tokens.weight":
                    return file.get_slice(key).get_shape()[0]
    return None
