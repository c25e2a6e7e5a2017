"""Fold offsets into biases: W (z + v) = W z + W v, so a constant offset in front of o_proj is a
bias after it, and the folded model computes the same function."""

from dataclasses import replace

import torch
from torch import nn

from lofit.errors import InputError
from lofit.heads import HeadOffset, attention_layers
from lofit.llm.config import SLIDING, ModelConfig
from lofit.llm.model import CausalLM

MAX_LOSS = 0.01  # of an offset's norm: rounding to bfloat16 takes 0.002
# Stock classes without a bias on o_proj. Where all layers see everything they are Llamas, whose
# class has one.
AS_LLAMA = ("mistral", "qwen2")


def weight_of(linear: nn.Linear) -> torch.Tensor:
    """A linear layer's weight in fp32: [out, in]; of one in 4 bits what it computes with."""
    if hasattr(linear.weight, "quant_state"):
        from lofit.quantize import dequantized

        return dequantized(linear).float()
    return linear.weight.float()


@torch.no_grad()
def shifts(model: CausalLM) -> dict[int, torch.Tensor]:
    """W_o v, what the offsets add after o_proj, of each edited layer: [hidden_size] fp32."""
    return {
        layer: weight_of(attention.o_proj) @ attention.head_out.all_heads().flatten()
        for layer, attention in enumerate(attention_layers(model))
        if isinstance(attention.head_out, HeadOffset)
    }


def with_biases(config: ModelConfig) -> ModelConfig:
    """The configuration of the folded model, in a class of transformers that has the biases.
    InputError if there is none."""
    if config.model_type in AS_LLAMA:
        if SLIDING in config.layer_types:
            raise InputError(
                f"{config.model_type} with a sliding window: no class of transformers has both the"
                " window and a bias after o_proj, which is where offsets go; take --format peft"
            )
        config = replace(config, model_type="llama", qkv_bias=False, layer_types=())
    return replace(config, attention_bias=True)


@torch.no_grad()
def fold(model: CausalLM) -> CausalLM:
    """A plain model that computes what the tuned one does, in its dtype. It shares its weights."""
    with torch.device("meta"):
        folded = CausalLM(with_biases(model.config))
    # `attention_bias` makes four biases a layer: zeros for those that we do not need, because some
    # programs leave a missing one to chance
    dtype = model.lm_head.weight.dtype
    weights = {key: torch.zeros(t.shape, dtype=dtype) for key, t in folded.state_dict().items()}
    weights |= {key: t for key, t in model.state_dict().items() if ".head_out." not in key}
    for layer, shift in shifts(model).items():
        key = f"model.layers.{layer}.self_attn.o_proj.bias"
        weights[key] = rounded(layer, shift, weights[key])
    folded.load_state_dict(weights, strict=True, assign=True)
    folded.tie_weights()
    return folded.eval()


def rounded(layer: int, shift: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """own + shift in own's dtype, summed in fp32 and cast once. own: the bias that the base has
    there. InputError if the dtype loses more of the offsets than MAX_LOSS."""
    stored = (own.float() + shift).to(own.dtype)
    lost = (stored.float() - own.float() - shift).norm() / shift.norm().clamp(min=1e-30)
    if not lost <= MAX_LOSS:
        share = f"{lost:.0%}" if lost.isfinite() else "all"
        raise InputError(
            f"{str(own.dtype).removeprefix('torch.')} would lose {share} of the offsets in layer"
            f" {layer}; take --dtype float32"
        )
    return stored
