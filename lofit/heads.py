"""The method's two edits of attention heads, and everything that attaches and ranks them.

An edit takes the place of the `head_out` slot of an attention layer and acts on
z: [batch, position, n_heads, head_dim], the heads' outputs right before `o_proj`, at every
position. Edits are fp32 whatever the model's dtype; the result is cast back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lofit.errors import InputError
from lofit.llm.model import Attention, CausalLM

INIT_STD = 1e-3  # of A and v: the paper's N(0, 1e-3) names the standard deviation (its code)
Head = tuple[int, int]  # (layer, head)


class HeadScale(nn.Module):
    """Step 1: z <- (1 + A) * z on every head of a layer (paper, section 3, "head selection").

    scale: A, [n_heads, head_dim] fp32.
    """

    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale.float())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z * (1 + self.scale)).to(z.dtype)


class HeadOffset(nn.Module):
    """Step 2: z <- z + v on the chosen heads of a layer (paper, section 3, "offset tuning").

    heads: the indices of the chosen heads, in any order; offset: v, [len(heads), head_dim] fp32.
    """

    def __init__(self, heads: list[int], offset: torch.Tensor, n_heads: int):
        super().__init__()
        self.offset = nn.Parameter(offset.float())
        self.n_heads = n_heads
        self.register_buffer("heads", torch.tensor(heads, device=offset.device), persistent=False)

    def all_heads(self) -> torch.Tensor:
        """v with zeros for the other heads: [n_heads, head_dim]. Adding all of it at once is faster
        than a loop over the chosen heads."""
        v = self.offset.new_zeros(self.n_heads, self.offset.shape[1])
        return v.index_copy(0, self.heads, self.offset)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z + self.all_heads()).to(z.dtype)


def attention_layers(model: CausalLM) -> list[Attention]:
    """The attention module of each layer; its `head_out` is the slot."""
    return [layer.self_attn for layer in model.model.layers]


def attach_scales(model: CausalLM, scales: torch.Tensor) -> list[nn.Parameter]:
    """Put a HeadScale into every layer. scales: [layer, head, head_dim]; returns the parameters."""
    _expect(scales, (*head_grid(model), model.config.head_dim), "scales")
    for attention, scale in zip(attention_layers(model), _on(model, scales), strict=True):
        attention.head_out = HeadScale(scale)
    return [attention.head_out.scale for attention in attention_layers(model)]


def attach_offsets(model: CausalLM, heads: list[Head], offsets: torch.Tensor) -> list[nn.Parameter]:
    """Put a HeadOffset into each layer that holds a chosen head, and clear the other slots.

    heads: K distinct (layer, head); offsets: [K, head_dim], row i belongs to heads[i]. Returns the
    parameters, one [k, head_dim] tensor for each layer with k of the heads.
    """
    check_heads(model, heads, "heads")
    _expect(offsets, (len(heads), model.config.head_dim), "offsets")
    offsets = _on(model, offsets)
    for layer, attention in enumerate(attention_layers(model)):
        rows = [i for i, (in_layer, _) in enumerate(heads) if in_layer == layer]
        inside, n_heads = [heads[i][1] for i in rows], model.config.num_attention_heads
        attention.head_out = HeadOffset(inside, offsets[rows], n_heads) if rows else nn.Identity()
    return [a.head_out.offset for a in attention_layers(model) if list(a.head_out.parameters())]


def init_scales(model: CausalLM, seed: int) -> torch.Tensor:
    """A ~ N(0, 1e-3) for every head: [layer, head, head_dim], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*head_grid(model), model.config.head_dim, generator=generator) * INIT_STD


def init_offsets(model: CausalLM, n: int, seed: int) -> torch.Tensor:
    """v ~ N(0, 1e-3) for n heads: [n, head_dim], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, model.config.head_dim, generator=generator) * INIT_STD


def get_edits(model: CausalLM) -> list[nn.Module]:
    """What is in the slot of each layer now, for `set_edits`."""
    return [attention.head_out for attention in attention_layers(model)]


def set_edits(model: CausalLM, edits: list[nn.Module]) -> None:
    """Put these edits back into the slots; the inverse of `get_edits`."""
    for attention, edit in zip(attention_layers(model), edits, strict=True):
        attention.head_out = edit


@contextmanager
def edits_off(model: CausalLM) -> Iterator[None]:
    """Inside, the model is the base model; the edits come back afterwards."""
    edits = get_edits(model)
    set_edits(model, [nn.Identity() for _ in edits])
    try:
        yield
    finally:
        set_edits(model, edits)


def attached_heads(model: CausalLM) -> list[Head]:
    """The heads that have offsets now, by layer."""
    return [
        (layer, head)
        for layer, edit in enumerate(get_edits(model))
        if isinstance(edit, HeadOffset)
        for head in edit.heads.tolist()
    ]


def lowest_edit(model: CausalLM) -> int:
    """The first layer with an edit; the number of layers if there is none."""
    edits = get_edits(model)
    edited = (i for i, edit in enumerate(edits) if not isinstance(edit, nn.Identity))
    return next(edited, len(edits))


def head_scores(model: CausalLM) -> torch.Tensor:
    """Score of each head, the norm of its learned scale ||A_l,h||_2: [layer, head]."""
    return torch.stack([a.head_out.scale.detach().norm(dim=-1) for a in attention_layers(model)])


def rank_heads(scores: torch.Tensor, k: int) -> list[Head]:
    """The k heads of highest score, descending; equal scores in order of layer and head."""
    order = scores.flatten().argsort(descending=True, stable=True)[:k].tolist()
    return [divmod(i, scores.shape[1]) for i in order]


def gather_offsets(model: CausalLM, heads: list[Head]) -> torch.Tensor:
    """The attached offsets as [K, head_dim] fp32 on CPU, row i for heads[i]."""
    rows = {}
    for layer, attention in enumerate(attention_layers(model)):
        if isinstance(attention.head_out, HeadOffset):
            inside = attention.head_out.heads.tolist()
            rows |= {(layer, h): v for h, v in zip(inside, attention.head_out.offset, strict=True)}
    return torch.stack([rows[head] for head in heads]).detach().cpu()


def check_heads(model: CausalLM, heads: list[Head], where: str) -> None:
    """Raise InputError unless `heads` are distinct heads of this model, at least one."""
    layers, per_layer = head_grid(model)
    if not heads:
        raise InputError(f"{where}: no heads; at least one is needed")
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < per_layer):
            raise InputError(
                f"{where}: there is no head {head} in layer {layer};"
                f" the model has {layers} layers of {per_layer} heads"
            )
    if len(set(heads)) != len(heads):
        raise InputError(f"{where}: a head is listed twice")


def head_grid(model: CausalLM) -> tuple[int, int]:
    """Number of layers, and of query heads in each."""
    return model.config.num_hidden_layers, model.config.num_attention_heads


def _on(model: CausalLM, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(device=model.lm_head.weight.device, dtype=torch.float32, copy=True)


def _expect(tensor: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{what}: shape {list(tensor.shape)}, this model needs {list(shape)}")
