"""The method's two edits of attention heads, and everything that attaches and ranks them.

An edit takes the place of the `head_out` slot of an attention layer and acts on
z: [batch, position, n_heads, head_dim], the heads' outputs right before `o_proj`, at every
position: prompt, answer and padding alike. A head is a *query* head: with grouped-query attention
several of them share keys and values, but each has its own z.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lofit.errors import InputError
from lofit.llm.model import Attention, CausalLM

INIT_STD = 1e-3  # of A and v: the paper's N(0, 1e-3) names the standard deviation (its code)
Head = tuple[int, int]  # (layer, head)


class Edit(nn.Module):
    """What stands in a slot instead of the identity. Its parameters are fp32 whatever the model's
    dtype, also after `model.to(torch.bfloat16)`: added to a bfloat16 number of size 1, a step of
    1e-3 rounds to nothing, so nothing would be learned. What it returns is cast back."""

    def _apply(self, fn, recurse: bool = True):
        def device_only(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(device_only, recurse)


class HeadScale(Edit):
    """Step 1: z <- (1 + A) * z on every head of a layer (paper, section 3, "head selection").

    scale: A, [n_heads, head_dim] fp32.
    """

    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale.float())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        # 1 + A and not A: near 0 the model is the one we know, and an L1 penalty, which pulls
        # towards 0, asks each head to show that it is worth being changed. z in bfloat16 times A in
        # fp32 is computed in fp32, and rounded once, at the end.
        return (z * (1 + self.scale)).to(z.dtype)


class HeadOffset(Edit):
    """Step 2: z <- z + v on the chosen heads of a layer (paper, section 3, "offset tuning").

    heads: the indices of the chosen heads, in any order; offset: v, [len(heads), head_dim] fp32.
    """

    def __init__(self, heads: list[int], offset: torch.Tensor, n_heads: int):
        super().__init__()
        self.offset = nn.Parameter(offset.float())
        self.n_heads = n_heads
        # moves with the model from device to device, but is nothing that is learned: not persistent
        self.register_buffer("heads", torch.tensor(heads, device=offset.device), persistent=False)

    def all_heads(self) -> torch.Tensor:
        """v with zeros for the other heads: [n_heads, head_dim]. One sum over the whole of z is
        faster than a loop over the chosen heads, and its gradient reaches these alone."""
        v = self.offset.new_zeros(self.n_heads, self.offset.shape[1])
        return v.index_copy(0, self.heads, self.offset)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        # v does not depend on z: the head says the same as before, and the same vector beside it,
        # for every text and at every position. So it is a bias, and an export folds it into one.
        return (z + self.all_heads()).to(z.dtype)


def attention_layers(model: CausalLM) -> list[Attention]:
    """The attention module of each layer; its `head_out` is the slot."""
    return [layer.self_attn for layer in model.model.layers]


def head_grid(model: CausalLM) -> tuple[int, int]:
    """Number of layers, and of query heads in each."""
    return model.config.num_hidden_layers, model.config.num_attention_heads


def every_head(model: CausalLM) -> list[Head]:
    layers, per_layer = head_grid(model)
    return [(layer, head) for layer in range(layers) for head in range(per_layer)]


def random_init(model: CausalLM, n: int, seed: int) -> torch.Tensor:
    """N(0, 1e-3) for n heads: [n, head_dim]."""
    # Near 0 the model is the one that was pretrained. The paper's code has not 0 itself but this;
    # as Adam divides each gradient by its own size, so small a start costs nothing. Drawn on the
    # CPU, where a seed gives the same numbers on every machine.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, model.config.head_dim, generator=generator) * INIT_STD


def attach_scales(model: CausalLM, scales: torch.Tensor) -> list[nn.Parameter]:
    """Put a HeadScale into every layer. scales: [layer, head, head_dim]; returns the parameters."""
    # All heads are scaled in one training, so a head is judged beside the others: where they do its
    # work already, its scale gains nothing, and the penalty keeps it small.
    scales = scales.detach().to(model.lm_head.weight.device)
    for attention, scale in zip(attention_layers(model), scales, strict=True):
        attention.head_out = HeadScale(scale.clone())
    return [attention.head_out.scale for attention in attention_layers(model)]


def attach_offsets(model: CausalLM, heads: list[Head], offsets: torch.Tensor) -> list[nn.Parameter]:
    """Put a HeadOffset into each layer that holds a chosen head, and clear the other slots.

    heads: K distinct (layer, head); offsets: [K, head_dim], row i belongs to heads[i]. Returns the
    parameters, one [k, head_dim] tensor for each layer with k of the heads. InputError for heads
    that the model does not have.
    """
    check_heads(model, heads, "heads")
    shape = (len(heads), model.config.head_dim)
    if offsets.shape != shape:
        raise InputError(f"offsets: shape {list(offsets.shape)}, this model needs {list(shape)}")
    offsets = offsets.detach().to(model.lm_head.weight.device)
    parameters = []
    for layer, attention in enumerate(attention_layers(model)):
        # one tensor a layer and not one a head: an optimiser's step costs by the tensor
        rows = [i for i, (in_layer, _) in enumerate(heads) if in_layer == layer]
        attention.head_out = nn.Identity()
        if rows:
            inside, n_heads = [heads[i][1] for i in rows], model.config.num_attention_heads
            attention.head_out = HeadOffset(inside, offsets[rows].clone(), n_heads)
            parameters.append(attention.head_out.offset)
    return parameters


def attached_offsets(model: CausalLM) -> tuple[list[Head], torch.Tensor]:
    """(K heads, their offsets [K, head_dim] fp32 on CPU) as they are attached now, by layer."""
    heads, rows = [], [torch.zeros(0, model.config.head_dim)]
    for layer, attention in enumerate(attention_layers(model)):
        if isinstance(attention.head_out, HeadOffset):
            heads += [(layer, head) for head in attention.head_out.heads.tolist()]
            rows.append(attention.head_out.offset.detach().cpu())
    return heads, torch.cat(rows)


def get_edits(model: CausalLM) -> list[nn.Module]:
    """What stands in the slot of each layer now, for `set_edits`."""
    return [attention.head_out for attention in attention_layers(model)]


def set_edits(model: CausalLM, edits: list[nn.Module]) -> None:
    """Put these into the slots; the inverse of `get_edits`."""
    for attention, edit in zip(attention_layers(model), edits, strict=True):
        attention.head_out = edit


def remove_edits(model: CausalLM) -> None:
    set_edits(model, [nn.Identity() for _ in attention_layers(model)])


@contextmanager
def edits_off(model: CausalLM) -> Iterator[None]:
    """Inside, the model is the base model, bit for bit; the edits come back afterwards."""
    # The weights were never touched, so a reference for DPO, or a base to compare with, needs no
    # second model in memory.
    edits = get_edits(model)
    remove_edits(model)
    try:
        yield
    finally:
        set_edits(model, edits)


def head_scores(model: CausalLM) -> torch.Tensor:
    """Score of each head, the norm of its learned scale ||A_l,h||_2: [layer, head] on CPU."""
    # The penalty is the same for every head, and so is what Adam makes of a small gradient: what is
    # left of A after it is what making this head larger or smaller does for the loss, and not what
    # an offset can do there (docs/results.md, section 2). A itself is then thrown away.
    scales = [attention.head_out.scale.detach() for attention in attention_layers(model)]
    return torch.stack([scale.norm(dim=-1) for scale in scales]).cpu()


def rank_heads(scores: torch.Tensor, k: int) -> list[Head]:
    """The k heads of highest score, descending; equal scores in order of layer and head."""
    # stable: heads of equal score must not change places from one machine to another
    order = scores.flatten().argsort(descending=True, stable=True)[:k].tolist()
    return [divmod(i, scores.shape[1]) for i in order]  # (layer, head)


def check_heads(model: CausalLM, heads: list[Head], where: str) -> None:
    """Raise InputError unless `heads` are distinct heads of this model, at least one."""
    layers, per_layer = head_grid(model)
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < per_layer):
            raise InputError(
                f"{where}: there is no head {head} in layer {layer};"
                f" the model has {layers} layers of {per_layer} heads"
            )
    if not heads or len(set(heads)) < len(heads):
        raise InputError(f"{where}: expected at least one head, and none of them twice")
