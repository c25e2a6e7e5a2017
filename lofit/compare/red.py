"""RED (arXiv 2402.15179): h <- scale * h + bias on what each layer's feed-forward part returns."""

import torch

from lofit.compare.edits import Edit
from lofit.llm.config import ModelConfig
from lofit.llm.model import Block


class RED(Edit):
    """scale, bias: [D]."""

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        super().__init__(block, tensors)
        self.change(block.mlp, lambda _, y: self.scale * y + self.bias)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int]]:
        return {"scale": (config.hidden_size,), "bias": (config.hidden_size,)}


def init(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """scale = 1, bias = 0: no change at first, whatever the seed."""
    D = config.hidden_size
    each = {"scale": torch.ones(D), "bias": torch.zeros(D)}
    layers = range(config.num_hidden_layers)
    return {f"layers.{i}.{name}": tensor for i in layers for name, tensor in each.items()}
