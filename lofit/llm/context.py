"""What one forward pass knows beside its hidden states: positions, masks, the key-value cache.

Shapes as in model.py.
"""

from dataclasses import dataclass

import torch

from lofit.llm import rope
from lofit.llm.config import SLIDING, ModelConfig


class KVCache:
    """Keys and values of every layer, allocated once and written at given positions."""

    def __init__(self, config: ModelConfig, batch: int, length: int, like: torch.Tensor):
        """`like` gives device and dtype. length: prompt plus new tokens."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length)
        # not like.new_zeros: of a split weight that would be split too
        kind = {"dtype": like.dtype, "device": like.device}
        self.k = torch.zeros(*shape, config.head_dim, **kind)
        self.v = torch.zeros(*shape, config.head_dim, **kind)

    def select_rows(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def before(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a cache of one row, put in front of those of any number of rows."""
        rows = (k.shape[0], -1, -1, -1)
        one = (self.k[layer].expand(rows), self.v[layer].expand(rows))
        return torch.cat((one[0], k), dim=2), torch.cat((one[1], v), dim=2)

    def write(
        self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v: [B, n_kv_heads, T, head_dim] at positions: [B, T]; return all of the layer's
        keys and values: [B, n_kv_heads, length, head_dim]."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        # advanced indices around a slice put [B, T] in front: hence the transposes
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]


@dataclass(frozen=True)
class Tree:
    """Texts with a common beginning, packed into rows so that the beginning is computed once: the
    trunk, then one branch for each text, which sees the trunk but no other branch.

    prefix: keys and values of what stands in front of every row, from a pass over one row.
    """

    positions: torch.Tensor  # [B, T] where each token stands in its own text
    branch: torch.Tensor  # [B, T] 0 in the trunk, else the branch's number
    prefix: KVCache | None = None


@dataclass
class Context:
    """What every layer needs beside the hidden states, computed once per forward pass.

    cos_sin, mask: by layer type, for rope.rotate and for `attend`.
    """

    positions: torch.Tensor  # [B or 1, T]
    cos_sin: dict[str, tuple[torch.Tensor, torch.Tensor]]
    mask: dict[str, torch.Tensor | None]
    cache: KVCache | None = None
    decoding: bool = False  # True: attend to the whole cache; False: to the T positions of the pass
    prefix: KVCache | None = None


def make_context(
    config: ModelConfig,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None = None,
    cache: KVCache | None = None,
    tree: Tree | None = None,
) -> Context:
    """What all layers share in a pass; arguments as in `model.Transformer.forward`."""
    decoding, kinds = positions is not None, config.rope_parameters
    length = cache.k.shape[3] if decoding else input_ids.shape[1]
    reach = torch.arange(length, device=input_ids.device)
    if tree is not None:
        positions = tree.positions
        masks = {kind: _tree_mask(config, kind, tree) for kind in kinds}
    else:
        positions = positions if decoding else reach[None]
        masks = {kind: _mask(config, kind, positions, reach, decoding) for kind in kinds}
    rotations = {kind: rope.cos_sin(config, kind, positions) for kind in kinds}
    prefix = None if tree is None else tree.prefix
    return Context(positions, rotations, masks, cache, decoding, prefix)


def _mask(
    config: ModelConfig, kind: str, positions: torch.Tensor, reach: torch.Tensor, decoding: bool
) -> torch.Tensor | None:
    """Mask for `attend`, [B or 1, 1, T, len(reach)]: None where causality is all of it."""
    window = config.sliding_window if kind == SLIDING else None
    narrow = window is not None and len(reach) > window
    if not (decoding or narrow):
        return None
    distance = positions[:, None, :, None] - reach
    return (distance >= 0) & (distance < window) if narrow else distance >= 0


def _tree_mask(config: ModelConfig, kind: str, tree: Tree) -> torch.Tensor:
    """Mask for `attend`, [B, 1, T, prefix + T]: a token sees its own text, up to itself."""
    (B, T), at, branch = tree.branch.shape, tree.positions, tree.branch
    order = torch.arange(T, device=branch.device)
    own = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    mask, key_at = own & (order[:, None] >= order), at
    if tree.prefix is not None:
        before = torch.arange(tree.prefix.k.shape[3], device=branch.device).expand(B, -1)
        key_at = torch.cat((before, at), dim=1)
        mask = torch.cat((mask.new_ones(B, T, before.shape[1]), mask), dim=2)
    if kind == SLIDING and config.sliding_window is not None:
        mask = mask & (at[:, :, None] - key_at[:, None] < config.sliding_window)
    return mask[:, None]
