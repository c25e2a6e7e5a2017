"""ModelConfig: what a Hugging Face `config.json` says about a model, under HF's own key names.

Data only: every difference between the supported models is a field here, never a branch on the
model's name. Files written by transformers 4 (`rope_theta` + `rope_scaling`) and by transformers 5
(`rope_parameters`) give the same config; so does the text part of a multimodal Gemma 3.

A new family is a row in DEFAULTS and ALWAYS, its name in save.py, and a row in tests/conftest.py,
which compares its logits with stock transformers'.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_json, reading

FULL, SLIDING = "full_attention", "sliding_attention"  # HF's names of layer types
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# RoPE type -> the keys it needs beside rope_theta (the others have defaults, see rope.py). Not
# "dynamic": its angles follow the longest text of a batch, so texts would depend on one another.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# What files may leave out, by family: HF's defaults. Gemma 3 4B's names five sizes and no more.
_LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_GEMMA = _LLAMA | {
    "max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_2 = _GEMMA | {
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2,
}  # fmt: skip
_QWEN = _LLAMA | {
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
DEFAULTS = {
    "llama": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA_2 | {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_theta": 1e6,
    },
    "mistral": _LLAMA | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}  # fmt: skip
# What a family always does, whatever its files say: Gemma 1's say "gelu" and mean its tanh form.
_TANH = {"hidden_act": "gelu_pytorch_tanh", "norm_adds_one": True, "scale_embeddings": True}
ALWAYS = {
    "llama": {},
    "gemma": _TANH,
    "gemma2": _TANH | {"sandwich_norms": True},
    "gemma3_text": _TANH | {"sandwich_norms": True, "qk_norms": True},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norms": True},
}
# Keys by which files say that their weights are no plain numbers, even where they are stored as
# floats: BitNet's are rounded as the model runs.
QUANTISED = ("quantization_config", "compression_config", "quantization")
PLAIN_CURE = (
    "take the checkpoint that it was made from, or convert it once with transformers:"
    " AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(NEW_DIR)"
)


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that change what the model computes. Sizes are counts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # query heads: the ones LoFiT selects from
    num_key_value_heads: int  # fewer than query heads = grouped-query attention
    head_dim: int  # times query heads need not be hidden_size: 16 x 256 and 3072 in Gemma 7B
    max_position_embeddings: int
    rms_norm_eps: float
    model_type: str = "llama"
    hidden_act: str = "silu"
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False
    tie_word_embeddings: bool = False  # lm_head shares embed_tokens' weight
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attn_logit_softcapping: float | None = None  # scores become cap * tanh(score / cap)
    final_logit_softcapping: float | None = None  # and so do the logits
    sliding_window: int | None = None  # positions that a sliding layer sees, its own included
    layer_types: tuple[str, ...] = ()  # FULL or SLIDING, one a layer; () = all FULL
    # layer type -> rope_type, rope_theta and what the type needs; Gemma 3 has two bases
    rope_parameters: dict[str, dict] = field(
        default_factory=lambda: {FULL: {"rope_type": "default", "rope_theta": 1e4}}
    )
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # Llama 3 and Gemma 3 have several
    # what no file says, only the family:
    norm_adds_one: bool = False  # RMSNorm multiplies by 1 + weight
    scale_embeddings: bool = False  # by the root of hidden_size
    sandwich_norms: bool = False  # also the outputs of attention and MLP are normed
    qk_norms: bool = False  # queries and keys are normed, per head, before RoPE
    qkv_bias: bool = False  # biases on q, k and v, none on o
    stored_in_4_bits: bool = False  # by bitsandbytes; quantize.py reads it

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`. InputError if it is missing, malformed or not supported."""
        return cls.from_hf(read_json(Path(path)), str(path))

    @classmethod
    def from_hf(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Build from the parsed JSON; `source` names the file in errors."""
        with reading(source):
            if raw.get("model_type") == "gemma3":  # text and vision: some keys may stand outside
                outer = ("bos_token_id", "eos_token_id", "tie_word_embeddings", *QUANTISED)
                outside = {key: raw[key] for key in outer if raw.get(key) is not None}
                raw = {"model_type": "gemma3_text"} | raw["text_config"] | outside
            family = raw.get("model_type")
            if family not in DEFAULTS:
                names = ", ".join((*DEFAULTS, "gemma3"))
                raise InputError(
                    f"{source}: model_type {family!r} is not supported; supported: {names}"
                )
            in_4_bits = _in_4_bits(raw.get("quantization_config"))
            for key in QUANTISED:
                if raw.get(key) is not None and not in_4_bits:
                    raise InputError(f"{source}: the model is quantised ({key}); {PLAIN_CURE}")
            if raw.get("use_bidirectional_attention"):
                raise ValueError("use_bidirectional_attention: only causal models are supported")
            values = _complete(DEFAULTS[family] | raw)
            own = {each.name for each in fields(cls)}
            values = {k: v for k, v in values.items() if k in own} | ALWAYS[family]
            config = cls(**values | {"stored_in_4_bits": in_4_bits})
            config._check()
        return config

    def _check(self) -> None:
        """Raise ValueError for what would be another model without a word, or no model at all."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in (int, bool) and type(value) is not each.type:
                raise ValueError(f"{each.name} is {value!r}, expected {each.type.__name__}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of"
                f" num_key_value_heads ({self.num_key_value_heads}), and head_dim"
                f" ({self.head_dim}) even"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}; supported: {', '.join(ACTIVATIONS)}")
        types = self.layer_types
        if not {*types} <= {FULL, SLIDING} or len(types) not in (0, self.num_hidden_layers):
            raise ValueError(f"layer_types: expected {FULL} or {SLIDING} for each layer")
        if SLIDING in types and not (type(self.sliding_window) is int and self.sliding_window > 0):
            raise ValueError(f"{SLIDING} layers need sliding_window, a count of positions")
        ids = [*self.eos_token_id, *([] if self.bos_token_id is None else [self.bos_token_id])]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"bos_token_id, eos_token_id {ids}: not all in the vocabulary")
        for rope in self.rope_parameters.values():
            _check_rope(rope)

    def layer_type(self, layer: int) -> str:
        """FULL or SLIDING."""
        return self.layer_types[layer] if self.layer_types else FULL


GEMMA_EXTRAS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def _in_4_bits(how: object) -> bool:
    """Whether a `quantization_config` is one that quantize.py reads."""
    kind = how.get("quant_method") if isinstance(how, dict) else None
    return kind == "bitsandbytes" and how.get("load_in_4bit") is True


def _check_rope(rope: dict) -> None:
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    for key in ("rope_theta", *ROPE_TYPES[kind]):
        if type(rope.get(key)) not in (int, float):
            raise ValueError(f"RoPE's {key} is {rope.get(key)!r}; {kind!r} needs a number")


def _complete(raw: dict) -> dict:
    """The values that a file may leave to its reader, in our form."""
    n_heads, types, eos = raw["num_attention_heads"], _layer_types(raw), raw.get("eos_token_id")
    some = {k: v for k, v in raw.items() if v is not None}  # null means: as if it was not there
    keep_null = {key: raw.get(key) for key in GEMMA_EXTRAS}  # but for Gemma 2's caps: none
    return some | keep_null | {
        "num_key_value_heads": raw.get("num_key_value_heads") or n_heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // n_heads,
        "sliding_window": raw.get("sliding_window") if SLIDING in types else None,
        "layer_types": types,
        "rope_parameters": {kind: _rope(raw, kind) for kind in sorted({FULL, *types})},
        "eos_token_id": () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    }  # fmt: skip


def _layer_types(raw: dict) -> tuple[str, ...]:
    """FULL or SLIDING of each layer; () = all FULL."""
    family, n, given = raw["model_type"], raw["num_hidden_layers"], raw.get("layer_types")
    if type(n) is not int or not 0 < n <= 1000:
        raise ValueError(f"num_hidden_layers is {n!r}, expected a whole number up to 1000")
    if family == "mistral":  # one window for all layers, or none
        return (SLIDING,) * n if raw.get("sliding_window") else ()
    if family.startswith("qwen"):
        if not raw.get("use_sliding_window"):  # a window may be named, and not be used
            return ()
        first = raw["max_window_layers"]  # the layers below see everything
        return tuple(given or (FULL if i < first else SLIDING for i in range(n)))
    every = raw.get("sliding_window_pattern")
    if given or not every:
        return tuple(given or ())
    return tuple(SLIDING if (i + 1) % every else FULL for i in range(n))


def _rope(raw: dict, kind: str) -> dict:
    """Any spelling -> one flat dict of a layer type, with at least rope_type and rope_theta.

    As in transformers, rope_scaling goes before rope_parameters; in a Gemma 3 it changes the
    rope_parameters of the full layers.
    """
    by_type = raw["model_type"] == "gemma3_text"
    local = by_type and kind == SLIDING
    theta = raw.get("rope_local_base_freq" if local else "rope_theta", 1e4)
    scaling, rope = raw.get("rope_scaling"), raw.get("rope_parameters") or {}
    if {FULL, SLIDING} & rope.keys():
        rope = rope.get(kind) or {}
    elif by_type and rope:
        raise ValueError(f"rope_parameters: a Gemma 3 has one for {FULL}, one for {SLIDING}")
    if scaling and not local:
        rope = rope | scaling if by_type else scaling
    rope = dict(rope)
    rope["rope_type"] = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)  # the oldest spelling of rope_type
    rope.setdefault("rope_theta", theta)
    if rope["rope_type"] in ("llama3", "yarn"):
        key = "original_max_position_embeddings"  # beside RoPE's own keys it goes first
        rope[key] = raw.get(key) or rope.get(key) or raw["max_position_embeddings"]
    return rope
