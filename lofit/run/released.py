"""Checkpoints that the paper released: whole models, with A and v of every head beside the weights
as model.layers.N.self_attn.attn_A.H and attn_v.H. Named as --model and --offsets, they are base
model and offsets."""

import re
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.files import open_tensors
from lofit.heads import Head, attach_offsets
from lofit.llm.hub import weight_files
from lofit.llm.model import CausalLM

RELEASED = re.compile(r"model\.layers\.(\d+)\.self_attn\.attn_(A|v)\.(\d+)$")


def read_released(folder: Path) -> tuple[list[Head], torch.Tensor]:
    """(heads, offsets [K, head_dim] fp32): the heads whose v is not zero. InputError if there are
    none, or if an A, a scale, is not zero: it is no part of a tuned model."""
    offsets: dict[Head, torch.Tensor] = {}
    for path in weight_files(folder):
        with open_tensors(path) as file:
            for key in filter(RELEASED.match, file.keys()):
                layer, kind, head = RELEASED.match(key).groups()
                tensor = file.get_tensor(key)
                if tensor.any() and kind == "A":
                    raise InputError(f"{path}: {key} is not zero; expected offsets (attn_v) alone")
                if tensor.any():
                    offsets[int(layer), int(head)] = tensor.float()
    if not offsets:
        raise InputError(f"{folder}: a model without offsets; expected a run folder or an adapter")
    heads = sorted(offsets)
    return heads, torch.stack([offsets[head] for head in heads])


def attach_released(folder: Path, model: CausalLM) -> dict:
    """Attach them; returns what load_offsets would say of them."""
    attach_offsets(model, *read_released(folder))
    return {"model": str(folder), "settings": {}}
