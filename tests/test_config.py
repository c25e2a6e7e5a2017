"""config.json in its spellings, and what is refused."""

import json

import pytest

from lofit.config import ModelConfig
from lofit.errors import InputError

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_defaults_of_the_first_llama_files():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | SCALING},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | SCALING},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | SCALING},
    ],
)
def test_rope_spellings_are_read_alike(spelling):
    config = ModelConfig.from_hf(LLAMA | spelling | {"max_position_embeddings": 4096})
    assert config.rope_parameters == SCALING | {
        "rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 4096
    }  # fmt: skip


def test_round_trip_in_both_spellings():
    raw = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config = ModelConfig.from_hf(raw | {"eos_token_id": [2, 7], "head_dim": 16})
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    for key in ("rope_parameters", "rope_theta"):  # a reader that knows one spelling only
        half = {k: v for k, v in written.items() if k != key}
        assert ModelConfig.from_hf(half) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; supported: llama"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"type": "longrope"}}, "RoPE type 'longrope' .*supported: default, lin"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' needs \['factor'\]"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not supported"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 7}, "head_dim .7. even"),
        ({"num_attention_heads": 0}, "missing or malformed key"),
        ({"hidden_size": "64"}, "missing or malformed key"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | values))
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="no such file"):
        ModelConfig.from_file(path)
    path.write_text("{")
    with pytest.raises(InputError, match="config.json, line 1: not valid JSON"):
        ModelConfig.from_file(path)
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        InputError, match="missing or malformed key: KeyError.'num_attention_heads'"
    ):
        ModelConfig.from_file(path)
