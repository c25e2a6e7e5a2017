"""What baselines attach to a model: parameters of their own, kept and stored by name."""

from collections.abc import Callable

import torch
from torch import nn

from lofit.errors import InputError
from lofit.llm.model import Block, CausalLM


class Edit(nn.Module):
    """A baseline's part in one layer. It sits in the layer's slot, where it lets z pass, and
    changes what other modules return for as long as it sits there: so `heads.edits_off`, and
    whatever attaches another edit, switch it off.

    tensors: its parameters by name; kept in fp32.
    """

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().float().clone()))
        self.sits = lambda: block.self_attn.head_out is self

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z

    def change(
        self, module: nn.Module, new: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        """From now on the module returns new(x, y) for its input x and own output y."""
        module.register_forward_hook(
            lambda _, args, y: new(args[0], y).to(y.dtype) if self.sits() else None
        )


def attach(model: CausalLM, kind: type[Edit], tensors: dict[str, torch.Tensor]) -> list:
    """Put a kind of edit into the layers that `tensors` ("layers.3.NAME") name; returns its
    parameters. InputError for a layer, name or shape that this model has not."""
    config, device = model.config, model.lm_head.weight.device
    expected = kind.shapes(config)
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        first, _, rest = key.partition(".")
        layer, _, name = rest.partition(".")
        known = first == "layers" and layer.isdecimal() and int(layer) < config.num_hidden_layers
        if not known or tuple(tensor.shape) != expected.get(name):
            raise InputError(f"{key} {list(tensor.shape)}: expected layers.N.{expected}")
        by_layer.setdefault(int(layer), {})[name] = tensor.to(device)
    for layer, block in enumerate(model.model.layers):
        own = by_layer.get(layer)
        if own and set(own) != set(expected):
            raise InputError(f"layer {layer}: expected {sorted(expected)}, found {sorted(own)}")
        block.self_attn.head_out = kind(block, own) if own else nn.Identity()
    return [p for _, p in _parameters(model)]


def gather(model: CausalLM) -> dict[str, torch.Tensor]:
    """The attached edits' parameters by name, fp32 on CPU: the inverse of `attach`."""
    return {name: p.detach().cpu() for name, p in _parameters(model)}


def _parameters(model: CausalLM) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"layers.{i}.{name}", p)
        for i, block in enumerate(model.model.layers)
        for name, p in block.self_attn.head_out.named_parameters()
    ]
