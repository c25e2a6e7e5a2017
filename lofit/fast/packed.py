"""Weights laid out for the CPU's matrix products, for as long as a model is only evaluated.

While tokens are generated a product has few rows, one a text. torch's default is slow at these;
oneDNN's is not, with weights in the layout that it asks for. That layout is a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

MAX_BYTES = 4 * 2**30  # of weights to copy


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a model on CPU multiply packed copies of their present weights
    and biases, without gradients: the same results but for rounding.

    Nothing changes on another device, for more than MAX_BYTES of weights, or where oneDNN has no
    product in the weights' dtype.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not _applies(linears):
        yield
        return
    for linear in linears:
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        linear.forward = partial(_product, packed, linear.bias)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _product(packed: torch.Tensor, bias: nn.Parameter | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _applies(linears: list[nn.Linear]) -> bool:
    first = linears[0].weight
    sharded = any(hasattr(linear.weight, "full_tensor") for linear in linears)
    if first.device.type != "cpu" or sharded or not torch.backends.mkldnn.is_available():
        return False
    in_dtype = first.dtype == torch.float32 or (
        first.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return in_dtype and sum(linear.weight.nbytes for linear in linears) <= MAX_BYTES
