"""Rotary position embeddings: the RoPE types that Llama and Gemma checkpoints come with.

Angles are computed in fp32 from the positions at every forward pass. There is no table that a
`.to(bfloat16)` could round or that loading could leave stale.
Formulas: RoFormer (arXiv 2104.09864), YaRN (2309.00071), Llama 3.1's model code.
"""

import math

import torch

from lofit.llm.config import ModelConfig


def cos_sin(
    config: ModelConfig, layer_type: str, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation of each position in the layers of a type.

    positions: [batch or 1, position] int64 -> cos, sin: [batch or 1, 1, position, head_dim] fp32
    (the axis of size 1 broadcasts over heads).
    """
    rope, dim = config.rope_parameters[layer_type], config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    inv_freq = 1.0 / rope["rope_theta"] ** exponents  # [head_dim / 2]
    scale = 1.0
    if rope["rope_type"] == "linear":
        inv_freq = inv_freq / rope["factor"]
    elif rope["rope_type"] == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif rope["rope_type"] == "yarn":
        inv_freq, scale = _yarn(rope, dim, inv_freq)
    angles = positions[:, None, :, None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)  # half-split layout, as in HF checkpoints
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + head_dim/2) of x: [batch, heads, position, head_dim], in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _llama3(rope: dict, inv_freq: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by factor, short ones kept, a linear blend between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # share of the unscaled frequency
    return (1 - keep) * inv_freq / rope["factor"] + keep * inv_freq


def _yarn(rope: dict, dim: int, inv_freq: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN: a ramp over dimensions between extrapolation and interpolation; also scales cos/sin."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def dimension_at(rotations: float) -> float:  # the dimension that turns this often in context
        ratio = original / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope["rope_theta"]))

    low = dimension_at(rope.get("beta_fast") or 32)
    high = dimension_at(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device)
    ramp = ((steps - low) / ((high - low) or 0.001)).clamp(0, 1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), _yarn_scale(rope)


def _yarn_scale(rope: dict) -> float:
    def mscale(m: float) -> float:
        return 0.1 * m * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)
