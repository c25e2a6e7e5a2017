"""Writing checkpoints as other programs read them: config.json and safetensors."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from lofit.llm.checkpoint import HEAD
from lofit.llm.config import FULL, GEMMA_EXTRAS, SLIDING, ModelConfig
from lofit.llm.hub import SINGLE
from lofit.llm.model import CausalLM

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
ONLY_OURS = (
    "norm_adds_one", "scale_embeddings", "sandwich_norms", "qk_norms", "qkv_bias",
    "stored_in_4_bits",
)  # fmt: skip


def hf_config(config: ModelConfig) -> dict:
    """`config.json` as a dict, with RoPE in both the transformers-4 and -5 spelling."""
    raw = asdict(config) | {"architectures": [ARCHITECTURES[config.model_type]]}
    for key in ONLY_OURS:
        del raw[key]
    if not config.model_type.startswith(("gemma2", "gemma3")):  # their files have none of these
        for key in GEMMA_EXTRAS:
            del raw[key]
        if not config.model_type.startswith("qwen") or not config.layer_types:
            del raw["layer_types"]  # transformers refuses an empty list
        if config.model_type in ("llama", "gemma"):
            del raw["sliding_window"]
        elif config.model_type != "mistral":
            raw["use_sliding_window"] = SLIDING in config.layer_types
    eos = list(config.eos_token_id) or None
    raw["eos_token_id"] = eos[0] if eos and len(eos) == 1 else eos
    rope = config.rope_parameters[FULL]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    raw["rope_theta"] = rope["rope_theta"]
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if config.model_type != "gemma3_text":
        raw["rope_parameters"] = rope
    elif SLIDING in config.rope_parameters:
        raw["rope_local_base_freq"] = config.rope_parameters[SLIDING]["rope_theta"]
    return raw


def save_model(model: CausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors in HF's format (tied weights once)."""
    weights = {k: v.to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights[HEAD]
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / SINGLE, weights)
    name = str(dtype).removeprefix("torch.")
    config = hf_config(model.config) | {"dtype": name, "torch_dtype": name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Tensors for other programs, in a folder that is renamed when it is whole."""
    path.touch()  # `save_file` makes files that nobody else may read: keep the usual permissions
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})  # without it transformers refuses a file
    path.chmod(mode)
