"""Keep the base model's weights in 4 bits (NF4, of QLoRA: arXiv 2305.14314), by bitsandbytes.

Used for --quantize, and for checkpoints that bitsandbytes quantised before. The blocks' linear
layers are quantised one by one as they are read, so the unquantised model is never whole in memory.
Norms, embedding, lm_head and the edits keep their dtype. The weights are frozen; gradients pass
through them.
"""

import torch
from torch import nn

from lofit.errors import InputError
from lofit.llm.checkpoint import Whole
from lofit.llm.model import CausalLM

try:
    import bitsandbytes as bnb
except ImportError:
    raise InputError('weights in 4 bits need bitsandbytes; pip install -e ".[quantize]"') from None

STATS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
KIND = {"quant_type": "nf4", "compress_statistics": True}  # the second: double quantisation


class Quantized(Whole):
    """Keeps the weights of the blocks' linear layers in 4 bits."""

    def __init__(self, dtype: torch.dtype, device: str):
        super().__init__(dtype, device)
        # what a checkpoint in 4 bits stores of each weight: its data as "", its statistics by name
        self.stored: dict[str, dict[str, torch.Tensor]] = {}

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Keep a stored tensor if it is a part of a weight that was quantised before; returns
        whether it is."""
        weight, _, part = name.partition(".weight.")
        if not is_linear(f"{weight.removesuffix('.weight')}.weight"):
            return False
        if part.startswith(STATS):
            self.stored.setdefault(f"{weight}.weight", {})[part] = tensor
        elif tensor.dtype == torch.uint8:
            self.stored.setdefault(name, {})[""] = tensor
        else:
            return False
        return True

    def keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_linear(name):
            return super().keep(name, tensor)
        # rounded to the dtype first, as transformers does: the 4 bits are then the same
        weight = bnb.nn.Params4bit(tensor.to(self.dtype), requires_grad=False, **KIND)
        return weight.to(self.device)

    def prepare(self, model: CausalLM, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, parts in self.stored.items():
            data = parts.pop("", None)
            if data is None:
                raise InputError(f"{name}: statistics of 4 bits without the weight itself")
            kept[name] = bnb.nn.Params4bit.from_prequantized(data, parts, device=self.device)
        for name in filter(is_linear, kept):
            path = name.removesuffix(".weight")
            parent, _, child = path.rpartition(".")
            old = model.get_submodule(path)
            with torch.device("meta"):
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, old.bias is not None, self.dtype, **KIND
                )
            # Without this line a pass without gradients on a CPU with bf16 units repacks the weight
            # for good and computes in bf16; later training steps have no gradients (0.50).
            new.support_avx512bf16_for_cpu = False
            new.weight = kept[name]
            setattr(model.get_submodule(parent), child, new)
        return kept


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a block's linear layer."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


@torch.no_grad()
def dequantized(linear: nn.Module) -> torch.Tensor:
    """The weight that a linear layer of 4 bits computes with: [out, in]."""
    weight = linear.weight
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
