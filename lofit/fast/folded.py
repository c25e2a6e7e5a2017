"""Offsets as biases of o_proj while a model is only evaluated: no work per head and token."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lofit.heads import HeadOffset, attention_layers
from lofit.llm.model import CausalLM


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
