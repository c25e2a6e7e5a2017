"""config.json in its spellings, and what is refused."""

import json
from copy import deepcopy
from importlib import import_module

import pytest
import torch

from lofit.errors import InputError
from lofit.llm.config import FULL, SLIDING, ModelConfig
from lofit.llm.rope import cos_sin
from lofit.llm.save import hf_config

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_defaults_of_the_first_llama_files():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert config.rope_parameters == {FULL: {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    "spelling",
    [{"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | SCALING},
     {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | SCALING},
     {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | SCALING}],
)  # fmt: skip
def test_rope_spellings_are_read_and_written_alike(spelling):
    more = {"max_position_embeddings": 4096, "eos_token_id": [2, 7], "head_dim": 16}
    config = ModelConfig.from_hf(LLAMA | spelling | more)
    assert config.rope_parameters[FULL] == SCALING | {
        "rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 4096
    }  # fmt: skip
    written = hf_config(config)
    for keys in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):  # one spelling only
        assert ModelConfig.from_hf({k: v for k, v in written.items() if k not in keys}) == config


SIZES = {k: v for k, v in LLAMA.items() if k != "model_type"}
GEMMA_3 = SIZES | {
    "model_type": "gemma3_text", "num_hidden_layers": 7, "num_key_value_heads": 4, "head_dim": 16,
    "sliding_window": 512, "eos_token_id": [1, 106],
}  # fmt: skip
OLD_ROPE = {
    "rope_theta": 5e5, "rope_local_base_freq": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
NEW_ROPE = {
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        SLIDING: {"rope_type": "default", "rope_theta": 2e4},
    }
}
PATTERN = [*[SLIDING] * 5, FULL, SLIDING]


def test_gemma_3_spellings_are_read_alike():
    new = ModelConfig.from_hf(GEMMA_3 | NEW_ROPE | {"layer_types": PATTERN})
    assert new.rope_parameters == NEW_ROPE["rope_parameters"]
    assert ModelConfig.from_hf(GEMMA_3 | OLD_ROPE | {"sliding_window_pattern": 6}) == new
    assert ModelConfig.from_hf(GEMMA_3 | OLD_ROPE) == new
    written = hf_config(new)
    assert ModelConfig.from_hf(written) == new
    del written["rope_parameters"]
    assert ModelConfig.from_hf(written) == new


def test_a_multimodal_gemma_3_is_its_text_part():
    """Gemma 3 4B's file: five sizes, the rest is the family's; token ids stand outside."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    for inner in ({}, {"model_type": "gemma3_text", "eos_token_id": 1}):
        raw = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text | inner}
        config = ModelConfig.from_hf(raw | {"vision_config": {"hidden_size": 1152}})
        assert config.model_type == "gemma3_text" and config.eos_token_id == (1, 106)
        assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
        assert (config.head_dim, config.vocab_size) == (config.query_pre_attn_scalar, 262208)
        assert config.head_dim == 256
        assert config.tie_word_embeddings and config.attn_logit_softcapping is None
        assert config.layer_types.count(FULL) == 5 and config.layer_type(5) == FULL
        assert config.rope_parameters[FULL]["rope_theta"] == 1e6
        assert config.rope_parameters[SLIDING] == {"rope_type": "default", "rope_theta": 1e4}


def test_defaults_of_gemma_2_and_what_a_file_changes():
    raw = SIZES | {"model_type": "gemma2"}
    config = ModelConfig.from_hf(raw)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.head_dim, config.sliding_window) == (256, 4096)
    assert config.layer_types == (SLIDING, FULL)
    other = ModelConfig.from_hf(raw | {"attn_logit_softcapping": None, "hidden_act": "gelu"})
    assert other.attn_logit_softcapping is None
    assert other.hidden_act == "gelu_pytorch_tanh"  # whatever the file says
    assert ModelConfig.from_hf(hf_config(config)) == config


BOTH = NEW_ROPE["rope_parameters"]
SPELLINGS = [  # what two programs could read in two ways
    ("Llama", OLD_ROPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} | {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    ("Llama", {"rope_scaling": {}, "rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0}),
    ("Llama", {"rope_theta": 9.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
    ("Llama", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
    ("Llama", {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}),
    ("Llama", {"original_max_position_embeddings": 16, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    ("Llama", {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}}),
    ("Llama", {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": 0, "truncate": None}}),
    ("Gemma2", OLD_ROPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("Gemma3Text", OLD_ROPE | NEW_ROPE),
    ("Gemma3Text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} | NEW_ROPE),
    ("Gemma3Text", {"rope_theta": 9.0, "rope_parameters": {FULL: BOTH[FULL]}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "spelling"), SPELLINGS)
def test_two_spellings_are_read_as_transformers_reads_them(family, spelling, transformers):
    """The rotation itself is compared, in every type of layer."""
    module = family.lower().removesuffix("text")
    raw = SIZES | {"num_hidden_layers": 7, "head_dim": 16, "max_position_embeddings": 64} | spelling
    theirs = getattr(transformers, f"{family}Config")(**deepcopy(raw))
    embedding = getattr(
        import_module(f"transformers.models.{module}.modeling_{module}"),
        f"{family.removesuffix('Text')}RotaryEmbedding",
    )(theirs)
    names = {"Llama": "llama", "Gemma2": "gemma2", "Gemma3Text": "gemma3_text"}
    config, at = ModelConfig.from_hf(raw | {"model_type": names[family]}), torch.arange(64)[None]
    for kind in config.rope_parameters:
        x, each = torch.ones(1, 64, 16), (kind,) if family == "Gemma3Text" else ()
        for ours, want in zip(cos_sin(config, kind, at), embedding(x, at, *each), strict=True):
            assert torch.equal(ours[:, 0], want)


def test_defaults_of_qwen_and_mistral():
    """A Qwen names a window and does not use it; a Mistral has one for all layers, or none."""
    qwen = SIZES | {"model_type": "qwen2", "sliding_window": 512}
    assert ModelConfig.from_hf(qwen).layer_types == ()
    used = ModelConfig.from_hf(qwen | {"use_sliding_window": True, "max_window_layers": 1})
    assert used.layer_types == (FULL, SLIDING) and used.qkv_bias
    mistral = SIZES | {"model_type": "mistral"}
    assert ModelConfig.from_hf(mistral).sliding_window == 4096
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).layer_types == ()
    assert ModelConfig.from_hf(SIZES | {"model_type": "qwen3"}).head_dim == 128
    for raw in (qwen, mistral, qwen | {"use_sliding_window": True, "max_window_layers": 1}):
        assert ModelConfig.from_hf(hf_config(ModelConfig.from_hf(raw))) == ModelConfig.from_hf(raw)


REFUSED = [  # what stands in the file -> what the error says
    ({"model_type": "phi3"}, "model_type 'phi3' is not supported; supported: llama, gemma, gem"),
    ({"model_type": None}, "model_type None"),
    ({"rope_scaling": {"type": "longrope"}}, "RoPE type 'longrope' .*supported: default, lin"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
    ({"rope_scaling": {"type": "linear"}}, "RoPE's factor is None; 'linear' needs a number"),
    ({"rope_scaling": {"type": "linear", "factor": "A:"}}, "RoPE's factor is 'A:'"),
    ({"rope_theta": None}, "RoPE's rope_theta is None"),
    ({"model_type": "gemma3_text", "num_hidden_layers": 7, "rope_parameters": {"rope_type": "x"}},
     "a Gemma 3 has one for full_attention, one for sliding"),
    ({"hidden_act": "swish"}, "hidden_act 'swish'; supported: silu"),
    ({"num_key_value_heads": 3}, "must be a multiple"),
    ({"head_dim": 7}, "head_dim .7. even"),
    ({"head_dim": True}, "head_dim is True"),
    ({"num_attention_heads": 0}, "missing or malformed"),
    ({"num_attention_heads": ...}, "malformed: key 'num_attention_heads' is missing"),
    ({"hidden_size": "64"}, "missing or malformed"),
    ({"vocab_size": 1.5}, "vocab_size is 1.5, expected int"),
    ({"intermediate_size": ""}, "intermediate_size is ''"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected bool"),
    ({"num_hidden_layers": [8, 8]}, "num_hidden_layers is"),
    ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
    ({"layer_types": [FULL, "chunked_attention"]}, "layer_types: expected full_attention or"),
    ({"layer_types": [FULL]}, "for each layer"), ({"layer_types": [[1]]}, "malformed"),
    ({"layer_types": [SLIDING, FULL]}, "layers need sliding_window"),
    ({"bos_token_id": 1e308}, "not all in the vocabulary"),
    ({"eos_token_id": 10**6}, "not all in the vocabulary"), ({"eos_token_id": "16"}, "vocabulary"),
    *(({key: {}}, f"quantised .{key}.*dequantize")
      for key in ("quantization_config", "compression_config", "quantization")),
    ({"use_bidirectional_attention": True}, "only causal models are supported"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_is_not_supported_is_refused(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in (LLAMA | values).items() if v is not ...}))
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")
