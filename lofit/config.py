"""ModelConfig: what a Hugging Face `config.json` says about a model, under HF's own key names.

Data only: every difference between the supported models is a field here, never a branch on the
model's name. Files written by transformers 4 (`rope_theta` + `rope_scaling`) and by transformers 5
(`rope_parameters`) are read alike.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_json

SUPPORTED = ("llama",)  # values of `model_type`
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# RoPE type -> the keys it needs beside rope_theta (the others have defaults, see rope.py)
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json` that change what the model computes. Sizes are counts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # query heads: the ones LoFiT selects from
    num_key_value_heads: int  # fewer than query heads = grouped-query attention
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    model_type: str = "llama"
    hidden_act: str = "silu"
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False
    tie_word_embeddings: bool = False  # lm_head shares embed_tokens' weight
    rope_parameters: dict = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4}
    )
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # Llama 3 has several

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json`. Raises InputError if it is missing, malformed or not supported."""
        return cls.from_hf(read_json(Path(path)), str(path))

    @classmethod
    def from_hf(cls, raw: dict, source: str = "config.json") -> "ModelConfig":
        """Build from the parsed JSON; `source` names the file in errors."""
        if raw.get("model_type") not in SUPPORTED:
            raise InputError(
                f"{source}: model_type {raw.get('model_type')!r} is not supported; "
                f"supported: {', '.join(SUPPORTED)}"
            )
        try:
            n_heads = raw["num_attention_heads"]
            config = cls(
                model_type=raw["model_type"],
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=n_heads,
                # HF's defaults for keys that older files leave out
                num_key_value_heads=raw.get("num_key_value_heads") or n_heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // n_heads,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                hidden_act=raw.get("hidden_act", "silu"),
                attention_bias=raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                rope_parameters=_rope_parameters(raw),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_id=_as_tuple(raw.get("eos_token_id")),
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"{source}: missing or malformed key: {error!r}") from None
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        rope = self.rope_parameters
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

    def to_hf(self) -> dict:
        """`config.json` as a dict, with RoPE in both the transformers-4 and -5 spelling."""
        raw = asdict(self) | {"architectures": ["LlamaForCausalLM"]}
        raw["eos_token_id"] = (
            self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None
        )
        raw["rope_theta"] = self.rope_parameters["rope_theta"]
        scaled = self.rope_parameters["rope_type"] != "default"
        scaling = {key: v for key, v in self.rope_parameters.items() if key != "rope_theta"}
        raw["rope_scaling"] = scaling if scaled else None
        return raw


def _rope_parameters(raw: dict) -> dict:
    """Either spelling -> one flat dict with at least rope_type and rope_theta."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)  # the oldest spelling of rope_type
    rope.setdefault("rope_theta", raw.get("rope_theta") or 1e4)
    if rope["rope_type"] in ("llama3", "yarn"):
        original = raw.get("original_max_position_embeddings")
        rope.setdefault(
            "original_max_position_embeddings", original or raw.get("max_position_embeddings", 2048)
        )
    return rope


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
