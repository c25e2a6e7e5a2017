"""LoRA (arXiv 2106.09685): W x + (alpha / r) B A x on q and v of every layer, r = 8, as the paper
compares with. Written as peft writes it, so that peft reads it."""

import math
from functools import partial

import torch
from torch import nn

from lofit.compare.edits import Edit
from lofit.files import Write, as_json, as_tensors
from lofit.llm.config import ModelConfig
from lofit.llm.model import Block

RANK, ALPHA, TARGETS = 8, 8, ("q_proj", "v_proj")


class LoRA(Edit):
    """NAME_A: [r, D], NAME_B: [out, r] of each target."""

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        super().__init__(block, tensors)
        for name in TARGETS:
            self.change(getattr(block.self_attn, name), partial(self.add, name))

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
        return y + (ALPHA / RANK) * (x.float() @ a.T @ b.T)

    @staticmethod
    def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Name -> shape of what a layer has."""
        n_heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
        found = {}
        for name in TARGETS:
            found[f"{name}_A"] = (RANK, config.hidden_size)
            found[f"{name}_B"] = (n_heads[name] * config.head_dim, RANK)
        return found


def init(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """A ~ U(-1/sqrt(D), 1/sqrt(D)) (Kaiming, as peft's), B = 0: no change at first."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_hidden_layers):
        for name, shape in LoRA.shapes(config).items():
            tensor = torch.zeros(shape)
            if name.endswith("_A"):
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
            found[f"layers.{layer}.{name}"] = tensor
    return found


def as_peft(tensors: dict[str, torch.Tensor], base: str) -> dict[str, Write]:
    """adapter_model.safetensors and adapter_config.json as peft's `save_pretrained` has them."""
    named = {}
    for key, tensor in tensors.items():
        at, name = key.rsplit(".", 1)
        module, part = name.rsplit("_", 1)
        named[f"base_model.model.model.{at}.self_attn.{module}.lora_{part}.weight"] = tensor
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    return {
        "adapter_config.json": as_json(config | {"lora_dropout": 0.0}),
        "adapter_model.safetensors": as_tensors(named, {"format": "pt"}),
    }
