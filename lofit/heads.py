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
from lofit.llm.device import widest
from lofit.llm.model import Attention, CausalLM

INIT_STD = 1e-3  # of A and v (paper's code; METHOD: N(0, 1e-3) is the standard deviation)
SIGMA_TEXTS = 64  # enough for a standard deviation
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

    heads: their indices, ascending or not; offset: v, [len(heads), head_dim] fp32; unit: what the
    offset of each head is measured in, [len(heads)], so that v = unit * offset; None = 1.
    """

    def __init__(
        self, heads: list[int], offset: torch.Tensor, n_heads: int, unit: torch.Tensor | None = None
    ):
        super().__init__()
        self.offset = nn.Parameter(offset.float())
        self.n_heads, self.unit = n_heads, unit
        self.register_buffer("heads", torch.tensor(heads, device=offset.device), persistent=False)

    def v(self) -> torch.Tensor:
        """What is added to each of the chosen heads: [len(heads), head_dim]."""
        return self.offset if self.unit is None else self.unit[:, None] * self.offset

    def all_heads(self) -> torch.Tensor:
        """v with zeros for the other heads: [n_heads, head_dim]. Adding all of it at once is faster
        than a loop over the chosen heads."""
        v = self.offset.new_zeros(self.n_heads, self.offset.shape[1])
        return v.index_copy(0, self.heads, self.v())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z + self.all_heads()).to(z.dtype)


def attention_layers(model: CausalLM) -> list[Attention]:
    """The attention module of each layer; its `head_out` is the slot."""
    return [layer.self_attn for layer in model.model.layers]


def attach_scales(model: CausalLM, scales: torch.Tensor) -> list[nn.Parameter]:
    """Put a HeadScale into every layer. scales: [layer, head, head_dim]; returns the parameters."""
    _expect(scales, (*_grid(model), model.config.head_dim), "scales")
    for attention, scale in zip(attention_layers(model), _on(model, scales), strict=True):
        attention.head_out = HeadScale(scale)
    return [attention.head_out.scale for attention in attention_layers(model)]


def attach_offsets(
    model: CausalLM, heads: list[Head], offsets: torch.Tensor, unit: torch.Tensor | None = None
) -> list[nn.Parameter]:
    """Put a HeadOffset into each layer that holds a chosen head, and clear the other slots.

    heads: K distinct (layer, head); offsets: [K, head_dim], row i belongs to heads[i], in units of
    unit[i] where [K] units are given. Returns the parameters, one [k, head_dim] tensor for each
    layer with k of the heads.
    """
    check_heads(model, heads, "heads")
    _expect(offsets, (len(heads), model.config.head_dim), "offsets")
    offsets, unit = _on(model, offsets), None if unit is None else _on(model, unit)
    for layer, attention in enumerate(attention_layers(model)):
        rows = [i for i, (in_layer, _) in enumerate(heads) if in_layer == layer]
        inside = [heads[i][1] for i in rows]
        n_heads, units = model.config.num_attention_heads, None if unit is None else unit[rows]
        edit = HeadOffset(inside, offsets[rows], n_heads, units) if rows else nn.Identity()
        attention.head_out = edit
    return [a.head_out.offset for a in attention_layers(model) if list(a.head_out.parameters())]


def init_scales(model: CausalLM, seed: int) -> torch.Tensor:
    """A ~ N(0, 1e-3) for every head: [layer, head, head_dim], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*_grid(model), model.config.head_dim, generator=generator) * INIT_STD


def init_offsets(model: CausalLM, n: int, seed: int) -> torch.Tensor:
    """v ~ N(0, 1e-3) for n heads: [n, head_dim], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, model.config.head_dim, generator=generator) * INIT_STD


@torch.no_grad()
def head_sigma(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """The standard deviation of each head's z over all positions of these texts (ids), pooled over
    head_dim: [layer, head] fp32 on CPU. A unit for offsets: heads of a model differ by far in size,
    and so do models."""
    layers, shape = attention_layers(model), (*_grid(model), model.config.head_dim)
    device = model.lm_head.weight.device
    wide = widest(device)
    total, square = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))

    def reader(layer: int):
        def read(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            z = args[0][0].to(wide)  # one text, so no padding: [position, n_heads, head_dim]
            total[layer] += z.sum(0)
            square[layer] += z.square().sum(0)

        return read

    hooks = [a.head_out.register_forward_pre_hook(reader(i)) for i, a in enumerate(layers)]
    try:
        for ids in texts:
            model.model(torch.tensor([ids], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    n = sum(map(len, texts))
    return (square / n - (total / n).square()).clamp(min=0).mean(-1).sqrt().float().cpu()


@contextmanager
def edits_off(model: CausalLM) -> Iterator[None]:
    """Inside, the model is the base model; the edits come back afterwards."""
    layers = attention_layers(model)
    edits = [attention.head_out for attention in layers]
    for attention in layers:
        attention.head_out = nn.Identity()
    try:
        yield
    finally:
        for attention, edit in zip(layers, edits, strict=True):
            attention.head_out = edit


@contextmanager
def folded_offsets(model: CausalLM) -> Iterator[None]:
    """Inside, each HeadOffset is a bias of its layer's o_proj, for W (z + v) = W z + W v: the same
    function without any work per head. The bias is computed in fp32 and cast once."""
    folded = []
    for attention in attention_layers(model):
        edit, o_proj = attention.head_out, attention.o_proj
        if isinstance(edit, HeadOffset):
            folded.append((attention, edit, o_proj.bias))
            bias = o_proj.weight.float() @ edit.all_heads().flatten()
            bias = bias if o_proj.bias is None else bias + o_proj.bias.float()
            o_proj.bias = nn.Parameter(bias.to(o_proj.weight.dtype), requires_grad=False)
            attention.head_out = nn.Identity()
    try:
        yield
    finally:
        for attention, edit, bias in folded:
            attention.head_out, attention.o_proj.bias = edit, bias


def attached_heads(model: CausalLM) -> list[Head]:
    """The heads that have offsets now, by layer."""
    slots = [(i, a.head_out) for i, a in enumerate(attention_layers(model))]
    return [(i, h) for i, s in slots if isinstance(s, HeadOffset) for h in s.heads.tolist()]


def lowest_edit(model: CausalLM) -> int:
    """The first layer with an edit; the number of layers if there is none."""
    slots = [attention.head_out for attention in attention_layers(model)]
    edited = (i for i, slot in enumerate(slots) if not isinstance(slot, nn.Identity))
    return next(edited, len(slots))


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
            rows |= {(layer, h): v for h, v in zip(inside, attention.head_out.v(), strict=True)}
    return torch.stack([rows[head] for head in heads]).detach().cpu()


def check_heads(model: CausalLM, heads: list[Head], where: str) -> None:
    """Raise InputError unless `heads` are distinct heads of this model, at least one."""
    layers, per_layer = _grid(model)
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


def _grid(model: CausalLM) -> tuple[int, int]:
    return model.config.num_hidden_layers, model.config.num_attention_heads


def _on(model: CausalLM, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(device=model.lm_head.weight.device, dtype=torch.float32, copy=True)


def _expect(tensor: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{what}: shape {list(tensor.shape)}, this model needs {list(shape)}")
