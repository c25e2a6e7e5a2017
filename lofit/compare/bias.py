"""A bias on every o_proj: what offsets of all heads amount to, for W (z + v) = W z + W v, but
trained in the hidden states' own coordinates."""

import torch

from lofit.compare.edits import Edit
from lofit.llm.config import ModelConfig
from lofit.llm.model import Block


class Bias(Edit):
    """bias: [D]."""

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        super().__init__(block, tensors)
        self.change(block.self_attn.o_proj, lambda _, y: y + self.bias)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int]]:
        return {"bias": (config.hidden_size,)}


def init(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Zeros: no change at first, whatever the seed."""
    layers = range(config.num_hidden_layers)
    return {f"layers.{i}.bias": torch.zeros(config.hidden_size) for i in layers}
