"""Trained offsets by name: a run, an adapter folder, a hub id, a checkpoint of the paper's."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lofit.checkpoint import find_folder, read_released, weight_files
from lofit.errors import InputError
from lofit.files import read_json
from lofit.heads import OFFSETS, Head, read_offsets

RESULTS = "results.json"


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
        path = self.folder / RESULTS
        found = read_json(path) if path.exists() else {}
        same = found.get("fingerprint") == self.info.get("fingerprint")
        same = same and found.get("heads") == [list(head) for head in self.heads]
        return found if same and "tuned" in found else None


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
    return Adapter(*read_offsets(path), path.parent)
