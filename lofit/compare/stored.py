"""A baseline's tensors in the run's file of offsets: which kind they are, and attaching them."""

import hashlib

import torch

from lofit.compare import bias, lora, post_block, red
from lofit.compare.edits import Edit, attach
from lofit.errors import InputError
from lofit.llm.model import CausalLM

KINDS: dict[str, type[Edit]] = {
    "lora": lora.LoRA, "red": red.RED, "bias": bias.Bias, "post_block": post_block.PostBlock,
    "repe": post_block.PostBlock,
}  # fmt: skip


def attach_stored(model: CausalLM, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """Attach what `methods.save_edits` wrote. InputError if it does not fit the model."""
    kind = KINDS.get(str(info["method"]))
    if kind is None:
        raise InputError(f"method {info['method']!r}: expected one of {', '.join(KINDS)}")
    attach(model, kind, tensors)


def hash_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """16 hex digits over names and values, as `artefacts.hash_of_offsets`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
