"""Random models of the shapes of known ones, and random texts, which are lists of ids."""

import random

import torch

from lofit.llm.config import FULL, ModelConfig
from lofit.llm.model import CausalLM

COMMON = dict(max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=(2,))
ROPE = {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}}
SHAPES = {
    "tiny": dict(  # for tests of the measurements
        vocab_size=1000, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
    "small": dict(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64,
    ),
    "7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128,
    ),
    "8b": dict(  # Llama 3.1's, but for the scaling of its RoPE
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        rope_parameters={FULL: {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "13b": dict(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, head_dim=128,
    ),
}  # fmt: skip


class Ids:
    """A "tokenizer" whose text is the ids, with spaces between."""

    eos_ids, end_id, unk_id = (2,), 2, None

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        before, after = ([int(i) for i in text.split()] for text in (prompt, answer))
        return [*before, *after], len(before)


def text(rng: random.Random, n: int, vocabulary: int = 32000) -> str:
    return "".join(f" {rng.randrange(3, vocabulary)}" for _ in range(n))


def config_of(shape: dict) -> ModelConfig:
    return ModelConfig(**COMMON | ROPE | shape)


def random_model(shape: dict, dtype: torch.dtype, device: str) -> CausalLM:
    """A frozen model of a shape of SHAPES, its weights drawn where they stay."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = CausalLM(config_of(shape))
    torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else None
    return model.eval().requires_grad_(False)
