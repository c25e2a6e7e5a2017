"""Offsets folded into a base model's files: W (z + v) = W z + W v, so a constant offset in front of
o_proj is a bias after it, and the folded model computes the same function.

Files are read tensor by tensor; the model as a whole is never in memory.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import (
    ROPE_TABLE,
    check_tensors,
    find_folder,
    fingerprint,
    hash_of_tensor,
    sample,
    share_ends,
    stored_tensors,
    text_name,
    weight_files,
)
from lofit.llm.config import ModelConfig
from lofit.llm.files import read_json
from lofit.llm.model import CausalLM
from lofit.run.adapters import RELEASED, Adapter, base_name

O_PROJ = re.compile(r"model\.layers\.(\d+)\.self_attn\.o_proj\.(weight|bias)$")
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")
MAX_LOSS = 0.01  # of an offset's norm: rounding to bfloat16 takes 0.002


@dataclass(frozen=True)
class FoldedBase:
    """A base model's files, and what the offsets add to them.

    shifts: W_o v of each edited layer, own: the base's bias there, [hidden_size] fp32 each. dtype:
    of the export; None = the base's tensors as stored, what is added in fp32. prefix: where
    transformers keeps the layers. Properties and methods raise InputError where dtype loses too
    much.
    """

    name: str
    revision: str | None
    folder: Path
    config: ModelConfig
    fingerprint: str
    stored_dtype: torch.dtype
    dtype: torch.dtype | None
    shifts: dict[int, torch.Tensor]
    own: dict[int, torch.Tensor]

    @property
    def raw_config(self) -> dict:
        return read_json(self.folder / "config.json")

    @property
    def prefix(self) -> str:
        return "model.language_model." if "text_config" in self.raw_config else "model."

    @cached_property
    def vectors(self) -> dict[int, torch.Tensor]:
        """What to add at the output of each edited layer's o_proj: [hidden_size]."""
        return {layer: self._rounded(layer, shift, 0) for layer, shift in self.shifts.items()}

    @cached_property
    def o_biases(self) -> dict[int, torch.Tensor]:
        """The whole bias of each edited layer's o_proj: [hidden_size]."""
        return {
            layer: self._rounded(layer, shift, self.own.get(layer, 0))
            for layer, shift in self.shifts.items()
        }

    def _rounded(self, layer: int, shift: torch.Tensor, own: torch.Tensor | int) -> torch.Tensor:
        stored = (own + shift).to(self.dtype or torch.float32)  # summed in fp32, cast once
        lost = (stored.float() - own - shift).norm() / shift.norm().clamp(min=1e-30)
        if not lost <= MAX_LOSS:
            share = f"{lost:.0%}" if lost.isfinite() else "all"
            raise InputError(
                f"--dtype {_name(stored.dtype)} would lose {share} of the offsets in layer {layer};"
                " take float32"
            )
        return stored

    def is_kept(self, key: str) -> bool:
        """Whether a stored tensor goes into the export; an edited layer's bias is written again."""
        found = O_PROJ.match(text_name(key) or "")
        if found and found[2] == "bias":
            return int(found[1]) not in self.o_biases
        return not key.endswith(ROPE_TABLE) and not RELEASED.match(key)

    def cast(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor in the export's dtype."""
        found = tensor if self.dtype is None else tensor.to(self.dtype)
        if found.dtype == torch.float16 != tensor.dtype and not found.isfinite().all():
            raise InputError(f"--dtype float16: {key} has values too large for it; take bfloat16")
        return found

    def biases_beside(self, key: str) -> dict[str, torch.Tensor]:
        """The biases of attention to store beside an o_proj's weight; none beside others."""
        found = O_PROJ.match(text_name(key) or "")
        if not found or found[2] == "bias":
            return {}
        layer, stem, config = int(found[1]), key.removesuffix("o_proj.weight"), self.config
        biases = {}
        if not config.attention_bias:
            kv = config.num_key_value_heads * config.head_dim
            sizes = {"q": config.num_attention_heads * config.head_dim, "k": kv, "v": kv}
            sizes["o"] = config.hidden_size
            dtype = self.dtype or torch.float32
            biases = {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}
        if layer in self.o_biases:
            biases["o"] = self.o_biases[layer]
        return {f"{stem}{name}_proj.bias": bias for name, bias in biases.items()}

    def hf_config(self) -> dict:
        """The base's config.json with biases, in both generations' spellings."""
        raw, ours = self.raw_config, self.config.to_hf()
        names = dict.fromkeys(("dtype", "torch_dtype"), _name(self.dtype or self.stored_dtype))
        changed = names | {key: ours[key] for key in ROPE_KEYS if key in ours}
        changed |= {"attention_bias": True, "vocab_size": self.config.vocab_size}
        if "text_config" in raw:
            return raw | names | {"text_config": raw["text_config"] | changed}
        return {"architectures": ours["architectures"]} | raw | changed  # servers go by it alone


def fold(adapter: Adapter, run: str, model: str | None, dtype: torch.dtype | None) -> FoldedBase:
    """Find the base model of an adapter, see that it is the very one, and compute W_o v.

    run: the adapter's name; model: where its base is, if not where the adapter says. Raises
    InputError if the base is missing, has other weights, or has no such heads.
    """
    info, name = adapter.info, model or adapter.info["model"]
    revision = None if Path(name).is_dir() else info.get("revision")
    try:
        folder = find_folder(name, revision)
    except InputError as error:
        raise InputError(f"{run}: its base model is missing ({error}); --model names it") from None
    config = ModelConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        attach_offsets(CausalLM(config), adapter.heads, adapter.offsets)  # sees whether they fit
    found = _scan(folder, _by_layer(config, adapter), dtype)
    embedding = found.shapes.get("model.embed_tokens.weight")
    if embedding and info["fingerprint"] is None:  # the paper's code adds a row for padding
        config = replace(config, vocab_size=embedding[0])
    with torch.device("meta"):
        check_tensors(share_ends(found.shapes, config), CausalLM(config), folder)
    weights = fingerprint(found.digests, config)
    if info["fingerprint"] not in (None, weights):
        raise InputError(
            f"{run}: made with {info['model']} (fingerprint {info['fingerprint']}), but {name} now"
            f" has {weights}; --model names the folder of the very same weights"
        )
    return FoldedBase(
        name,
        revision,
        folder,
        config,
        weights,
        found.dtype,
        dtype,
        dict(sorted(found.shifts.items())),
        found.own,
    )


@dataclass
class _Scan:
    digests: dict[str, bytes]
    shapes: dict[str, torch.Size]
    shifts: dict[int, torch.Tensor]
    own: dict[int, torch.Tensor]
    dtype: torch.dtype | None = None


def _scan(folder: Path, v: dict[int, torch.Tensor], dtype: torch.dtype | None) -> _Scan:
    """One pass over a model's tensors. v: [n_heads * head_dim] fp32 by layer."""
    found = _Scan({}, {}, {}, {})
    for key, tensor in stored_tensors(weight_files(folder), base_name):
        name = base_name(key)
        found.digests[name] = hash_of_tensor(tensor.shape, sample(tensor, tensor.shape))
        found.shapes[name] = tensor.shape
        o_proj = O_PROJ.match(name)
        if not o_proj or int(o_proj[1]) not in v:
            continue
        layer, as_exported = int(o_proj[1]), tensor.to(dtype or tensor.dtype).float()
        if o_proj[2] == "bias":
            found.own[layer] = as_exported
        elif tensor.shape[1:] == v[layer].shape:  # else a later check says what is wrong
            found.shifts[layer], found.dtype = as_exported @ v[layer], tensor.dtype
    return found


def _by_layer(config: ModelConfig, adapter: Adapter) -> dict[int, torch.Tensor]:
    """v of all heads of each edited layer, zero where a head has none."""
    v = {layer: torch.zeros(config.num_attention_heads, config.head_dim)
         for layer in sorted({layer for layer, _ in adapter.heads})}  # fmt: skip
    for (layer, head), offset in zip(adapter.heads, adapter.offsets, strict=True):
        v[layer][head] = offset
    return {layer: values.flatten() for layer, values in v.items()}


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
