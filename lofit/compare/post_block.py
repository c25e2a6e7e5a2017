"""A vector added to what a layer returns, after its attention and feed-forward parts: trained (a
place that arXiv 2603.00425 prefers to heads), or found without training (repe.py)."""

import torch

from lofit.compare.edits import Edit
from lofit.llm.config import ModelConfig
from lofit.llm.model import Block


class PostBlock(Edit):
    """shift: [D]."""

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        super().__init__(block, tensors)
        self.change(block, lambda _, y: y + self.shift)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int]]:
        return {"shift": (config.hidden_size,)}


def init(
    config: ModelConfig, seed: int, layers: list[int] | None = None
) -> dict[str, torch.Tensor]:
    """Zeros for these layers, or for all: no change at first, whatever the seed."""
    layers = range(config.num_hidden_layers) if layers is None else layers
    return {f"layers.{i}.shift": torch.zeros(config.hidden_size) for i in layers}


def spread(n_layers: int, k: int) -> list[int]:
    """k of the layers, evenly spread: the middle one of each of k equal parts."""
    return [(2 * i + 1) * n_layers // (2 * k) for i in range(k)]
