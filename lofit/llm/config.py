"""ModelConfig: what a Hugging Face `config.json` says about a model, under HF's own key names.

Data only: every difference between the supported models is a field here, never a branch on the
model's name. Files written by transformers 4 (`rope_theta` + `rope_scaling`) and by transformers 5
(`rope_parameters`) give the same config; so does the text part of a multimodal Gemma 3.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lofit.errors import InputError
from lofit.llm.files import read_json, what_it_is

FULL, SLIDING = "full_attention", "sliding_attention"  # HF's names of layer types
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# RoPE type -> the keys it needs beside rope_theta (the others have defaults, see rope.py)
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# What a family always does, whatever its files say: Gemma 1's say "gelu" and mean its tanh form.
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "norm_adds_one": True, "scale_embeddings": True}
ALWAYS = {
    "llama": {},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"sandwich_norms": True},
    "gemma3_text": GEMMA | {"sandwich_norms": True, "qk_norms": True},
}
# HF's defaults of keys that files leave out: Gemma 3 4B's names five sizes and no more.
_LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_GEMMA = {
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "head_dim": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_2 = _GEMMA | {
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2,
}  # fmt: skip
DEFAULTS = {
    "llama": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA_2 | {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_theta": 1e6,
    },
}  # fmt: skip
_OUTER = ("bos_token_id", "eos_token_id", "tie_word_embeddings")  # of a multimodal file
SUPPORTED = (*DEFAULTS, "gemma3")  # values of `model_type`; the last wraps a gemma3_text
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

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`. Raises InputError if it is missing, malformed or not supported."""
        path = Path(path)
        if not path.exists() and (kind := what_it_is(path.parent)):
            raise InputError(kind)
        return cls.from_hf(read_json(path), str(path))

    @classmethod
    def from_hf(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Build from the parsed JSON; `source` names the file in errors."""
        if raw.get("model_type") not in SUPPORTED:
            raise InputError(
                f"{source}: model_type {raw.get('model_type')!r} is not supported; "
                f"supported: {', '.join(SUPPORTED)}"
            )
        for part in (raw, raw.get("text_config")):
            for key in QUANTISED:
                if isinstance(part, dict) and part.get(key) is not None:
                    raise InputError(
                        f"{source}: the model is quantised ({key}), which is not supported;"
                        f" {PLAIN_CURE}"
                    )
        try:
            config = cls(**_fields(raw, source))
            config._check(source)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{source}: missing or malformed key: {error!r}") from None
        return config

    def _check(self, source: str) -> None:
        for name, fits in FITS.items():
            fits(f"{source}: {name}", getattr(self, name))
        for i in (*self.eos_token_id, *([] if self.bos_token_id is None else [self.bos_token_id])):
            _whole(0, self.vocab_size - 1)(f"{source}: a token id of bos or eos", i)
        for rope in self.rope_parameters.values():
            for name, value in rope.items():
                if name in ROPE_FITS and (value is not None or name == "rope_theta"):
                    ROPE_FITS[name](f"{source}: RoPE's {name}", value)
            if rope["rope_type"] not in ROPE_TYPES:
                raise InputError(
                    f"{source}: RoPE type {rope['rope_type']!r} is not supported; "
                    f"supported: {', '.join(ROPE_TYPES)}"
                )
            missing = [key for key in ROPE_TYPES[rope["rope_type"]] if rope.get(key) is None]
            if missing:
                raise InputError(f"{source}: RoPE type {rope['rope_type']!r} needs {missing}")
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"{source}: hidden_act {self.hidden_act!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise InputError(
                f"{source}: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}), head_dim ({self.head_dim}) even"
            )
        types = self.layer_types
        if not set(types) <= {FULL, SLIDING} or len(types) not in (0, self.num_hidden_layers):
            raise InputError(
                f"{source}: layer_types must name {FULL} or {SLIDING} for each of the"
                f" {self.num_hidden_layers} layers, found {list(types)}"
            )
        if SLIDING in types and not self.sliding_window:
            raise InputError(
                f"{source}: {SLIDING} layers need sliding_window, a count of positions"
            )

    def layer_type(self, layer: int) -> str:
        """FULL or SLIDING."""
        return self.layer_types[layer] if self.layer_types else FULL

    def to_hf(self) -> dict:
        """`config.json` as a dict, with RoPE in both the transformers-4 and -5 spelling."""
        raw = asdict(self) | {"architectures": [ARCHITECTURES[self.model_type]]}
        for key in ONLY_OURS:
            del raw[key]
        if self.model_type in ("llama", "gemma"):  # their files have none of these
            for key in ("sliding_window", "layer_types", *ATTENTION_EXTRAS):
                del raw[key]
        raw["eos_token_id"] = (
            self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None
        )
        rope = self.rope_parameters[FULL]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        raw["rope_theta"] = rope["rope_theta"]
        raw["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
        if self.model_type != "gemma3_text":
            raw["rope_parameters"] = rope
        elif SLIDING in self.rope_parameters:
            raw["rope_local_base_freq"] = self.rope_parameters[SLIDING]["rope_theta"]
        return raw


def _fail(what: str, value: object, expected: str) -> None:
    raise InputError(f"{what} is {str(value)[:60]!r}; expected {expected}")


def _whole(low: int, high: int) -> Callable[[str, object], None]:
    def fits(what: str, value: object) -> None:
        if type(value) is not int or not low <= value <= high:
            _fail(what, value, f"a whole number from {low} to {high}")

    return fits


def _real(low: float, high: float, none: bool = False) -> Callable[[str, object], None]:
    def fits(what: str, value: object) -> None:
        if value is None and none:
            return
        if type(value) not in (int, float) or not low <= value <= high:
            _fail(what, value, f"a number from {low:g} to {high:g}")

    return fits


def _truth(what: str, value: object) -> None:
    if type(value) is not bool:
        _fail(what, value, "true or false")


# What each field may be. The bounds are far beyond any model: they keep a damaged file from being
# built for minutes.
MOST_LAYERS, MOST = 1000, 10**7
FITS: dict[str, Callable[[str, object], None]] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), _whole(1, 10 * MOST)),
    **dict.fromkeys(("hidden_size", "intermediate_size"), _whole(1, 2**20)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), _whole(1, 2**14)),
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    "rms_norm_eps": _real(0, 1),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), _truth),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        _real(1e-6, 1e9, none=True),
    ),
    "sliding_window": lambda what, value: value is None or _whole(1, 10 * MOST)(what, value),
}
ROPE_FITS: dict[str, Callable[[str, object], None]] = {
    "rope_theta": _real(1.001, 1e12),
    **dict.fromkeys(
        ("factor", "attention_factor", "low_freq_factor", "high_freq_factor"), _real(1e-6, 1e6)
    ),
    # 0 stands for the default
    **dict.fromkeys(("mscale", "mscale_all_dim", "beta_fast", "beta_slow"), _real(0, 1e6)),
    "original_max_position_embeddings": _whole(1, 10 * MOST),
    "truncate": _truth,
}
ONLY_OURS = ("norm_adds_one", "scale_embeddings", "sandwich_norms", "qk_norms")
ATTENTION_EXTRAS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip


def _fields(raw: dict, source: str) -> dict:
    """The values of ModelConfig's fields. Raises KeyError and the like for a malformed `raw`."""
    if raw["model_type"] == "gemma3":  # text and vision: the token ids may stand outside
        outer = {k: raw[k] for k in _OUTER if raw.get(k) is not None}
        raw = {"model_type": "gemma3_text"} | raw["text_config"] | outer
    if raw.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: only causal models are supported")
    kind = raw["model_type"]
    raw = DEFAULTS[kind] | raw
    n_heads, n_layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    _whole(1, MOST_LAYERS)(f"{source}: num_hidden_layers", n_layers)
    types = _layer_types(raw, n_layers)
    values = dict(
        model_type=kind,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=raw.get("num_key_value_heads") or n_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // n_heads,
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        hidden_act=raw.get("hidden_act", "silu"),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        sliding_window=raw.get("sliding_window") if SLIDING in types else None,
        layer_types=types,
        rope_parameters={t: _rope(raw, t) for t in sorted({FULL, *types})},
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=_as_tuple(raw.get("eos_token_id")),
    )
    return values | {key: raw.get(key) for key in ATTENTION_EXTRAS} | ALWAYS[kind]


def _layer_types(raw: dict, n_layers: int) -> tuple[str, ...]:
    """Given, or every n-th layer FULL and the others SLIDING, or () = all FULL."""
    pattern = raw.get("sliding_window_pattern")
    if raw.get("layer_types") or not pattern:
        return tuple(raw.get("layer_types") or ())
    return tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(n_layers))


def _rope(raw: dict, layer_type: str) -> dict:
    """Any spelling -> one flat dict of a layer type, with at least rope_type and rope_theta.

    As in transformers, rope_scaling goes before rope_parameters; in a Gemma 3 it changes the
    rope_parameters of the full layers.
    """
    by_type, sliding = raw["model_type"] == "gemma3_text", layer_type == SLIDING
    theta = raw.get("rope_local_base_freq" if by_type and sliding else "rope_theta", 1e4)
    scaling, rope = raw.get("rope_scaling"), raw.get("rope_parameters") or {}
    if {FULL, SLIDING} & rope.keys():
        rope = rope.get(layer_type) or {}
    elif by_type and rope:
        raise ValueError(f"rope_parameters: a Gemma 3 has one for {FULL}, one for {SLIDING}")
    if scaling and not (by_type and sliding):
        rope = rope | scaling if by_type else scaling
    rope = dict(rope)
    rope["rope_type"] = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)  # the oldest spelling of rope_type
    rope.setdefault("rope_theta", theta)
    if rope["rope_type"] in ("llama3", "yarn"):
        key = "original_max_position_embeddings"  # beside RoPE's own keys it goes first
        rope[key] = raw.get(key) or rope.get(key) or raw["max_position_embeddings"]
    return rope


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
