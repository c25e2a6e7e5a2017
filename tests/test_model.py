"""The transformer against stock transformers, family by family, and against the paper's code."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    HAS_GPU,
    LOUD,
    LOUD_GEMMAS,
    LOUD_LLAMAS,
    LOUD_MODELS,
    REPO,
    SEES_GPU,
    TOLERANCE,
    difference,
    random_model,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from lofit.errors import InputError
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ALWAYS, FULL, ROPE_TYPES, ModelConfig
from lofit.llm.model import KVCache, attend, make_context

T = 40  # longer than the 16 positions that the scaled RoPE configs were "trained" on


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, LOUD["vocab_size"], (3, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hf_logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.parametrize("name", LOUD_MODELS)
@torch.no_grad()
def test_logits_and_z_of_each_layer_agree_with_transformers(loud, ids, name):
    """Right padding needs no mask: what stands behind a text changes nothing in it."""
    theirs, folder = loud(name)
    ours, got, want, handles = load_model(folder), [], [], []
    for mine, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        mine.self_attn.head_out.register_forward_hook(
            lambda _, args, out: got.append(out.flatten(2))
        )
        handles.append(
            other.self_attn.o_proj.register_forward_pre_hook(lambda _, args: want.append(args[0]))
        )
    logits, wanted = ours(ids), hf_logits(theirs, ids)
    for handle in handles:
        handle.remove()
    assert wanted.std() > 1, "not loud: a wrong model would pass"
    pairs = enumerate(zip(got, want, strict=True))
    wrong = [layer for layer, (a, b) in pairs if difference(a, b) > TOLERANCE]
    assert not wrong, f"z differs in layers {wrong}"
    assert difference(logits, wanted) < TOLERANCE

    real = torch.arange(T) < torch.tensor([T, 23, 11])[:, None]
    padded = hf_logits(theirs, ids.where(real, 0), attention_mask=real.long())
    assert difference(ours(ids.where(real, 5))[real], padded[real]) < TOLERANCE


@pytest.mark.parametrize("name", LOUD_MODELS)
@torch.no_grad()
def test_cached_logits_agree_with_transformers(loud, ids, name):
    theirs, folder = loud(name)
    ours, start = load_model(folder), 28  # the window of 10 lies behind the prompt at the end
    cache = KVCache(ours, len(ids), T)

    def logits(ids, positions=None):
        context = make_context(ours.config, ids, positions, cache)
        return ours.logits(ours.model(ids, context))

    out = theirs(ids[:, :start], use_cache=True)
    assert difference(logits(ids[:, :start]), out.logits) < TOLERANCE
    for t in range(start, T):
        out = theirs(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        positions = torch.full((len(ids), 1), t)
        assert difference(logits(ids[:, t : t + 1], positions), out.logits) < TOLERANCE


# config field -> (loud config on which it matters, its changed value)
MUTATIONS = {
    "vocab_size": ("llama2", 102),
    "hidden_size": ("llama2", 64),
    "intermediate_size": ("llama2", 80),
    "num_hidden_layers": ("llama2", 2),
    "num_attention_heads": ("llama2", 8),
    "num_key_value_heads": ("gqa", 4),
    "head_dim": ("llama2", 16),
    "rms_norm_eps": ("llama2", 1e-5),
    "model_type": ("llama2", "gemma"),
    "hidden_act": ("llama2", "gelu"),
    "attention_bias": ("biases", False),
    "mlp_bias": ("biases", False),
    "tie_word_embeddings": ("llama2", True),
    "query_pre_attn_scalar": ("gemma2", 20),
    "attn_logit_softcapping": ("gemma2", None),
    "final_logit_softcapping": ("gemma2", 5.0),
    "sliding_window": ("gemma3", 12),
    "layer_types": ("gemma3", ["sliding_attention"] * 6 + ["full_attention"]),
    "rope_parameters": ("llama3-tied", {"rope_type": "default", "rope_theta": 300.0}),
}
# no file says these, only the family
TRAITS = ("norm_adds_one", "scale_embeddings", "sandwich_norms", "qk_norms", "qkv_bias")
# test_tokenizer.py mutates the ids, test_quantize.py the bits; positions are a limit, and RoPE's
# where it names none (yarn)
NOT_IN_LOGITS = {"bos_token_id", "eos_token_id", "stored_in_4_bits", "max_position_embeddings"}
ROPE_MUTATIONS = [
    *((name, "rope_theta", 1e4) for name in LOUD_MODELS if name != "gemma3"),
    ("gemma3", "full_attention.rope_theta", 300.0),
    ("gemma3", "full_attention.factor", 4.0),
    ("gemma3", "sliding_attention.rope_theta", 2000.0),
    *((name, "factor", 2.0) for name in ("llama3-tied", "linear", "yarn")),
    ("llama3-tied", "low_freq_factor", 2.0),
    ("llama3-tied", "high_freq_factor", 8.0),
    ("llama3-tied", "original_max_position_embeddings", 32),
    ("yarn", "original_max_position_embeddings", 32),
    ("yarn-all", "beta_fast", 2.4),
    ("yarn-all", "beta_slow", 2.0),
    ("yarn-all", "truncate", True),
    ("yarn-all", "mscale", 2.0),
    ("yarn-all", "mscale_all_dim", 1.0),
    ("yarn-attention", "attention_factor", 1.0),
    ("linear", "rope_type", "default"),
]


def changed(folder, tmp_path, **values):
    """A copy of a model folder whose config.json says something else."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))
    return copy


def breaks(theirs, folder, ids) -> bool:
    try:
        got = load_model(folder)(ids)
    except (InputError, RuntimeError):
        return True
    return difference(got, hf_logits(theirs, ids)) > 100 * TOLERANCE


def test_every_config_field_is_mutated():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == MUTATIONS.keys() | set(TRAITS) | NOT_IN_LOGITS
    assert {rope["rope_parameters"]["rope_type"] for rope in LOUD_LLAMAS.values()} == set(
        ROPE_TYPES
    )


@pytest.mark.parametrize(("name", "values"), [
    *((name, {field: value}) for field, (name, value) in MUTATIONS.items()),
    # more families of fields that only some have
    ("mistral-window", {"sliding_window": 12}), ("mistral-window", {"sliding_window": None}),
    ("mistral", {"sliding_window": 10}), ("qwen2", {"model_type": "llama"}),
    ("qwen2-window", {"use_sliding_window": False, "layer_types": None}),
    ("qwen2-window", {"layer_types": None, "max_window_layers": 2}),
    ("qwen3", {"model_type": "qwen2"}),
])  # fmt: skip
def test_a_changed_field_breaks_parity(loud, ids, tmp_path, name, values):
    theirs, folder = loud(name)
    assert breaks(theirs, changed(folder, tmp_path, **values), ids)


@pytest.mark.parametrize("name", ["gemma-mha", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("trait", TRAITS)
def test_a_changed_trait_breaks_parity(loud, ids, monkeypatch, name, trait):
    theirs, folder = loud(name)
    kind = ModelConfig.from_file(folder / "config.json").model_type
    monkeypatch.setitem(ALWAYS, kind, ALWAYS[kind] | {trait: not ALWAYS[kind].get(trait, False)})
    assert breaks(theirs, folder, ids)


@pytest.mark.parametrize(("name", "key", "value"), ROPE_MUTATIONS)
def test_a_changed_rope_key_breaks_parity(loud, ids, tmp_path, name, key, value):
    theirs, folder = loud(name)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    *layer_type, key = key.split(".")
    where = rope[layer_type[0]] if layer_type else rope
    assert where[key] != value
    where[key] = value
    assert breaks(theirs, changed(folder, tmp_path, rope_parameters=rope), ids)


@pytest.mark.parametrize("name", ["gqa", "llama3-tied", "biases", "qwen3", *LOUD_GEMMAS])
def test_bfloat16_is_as_close_to_float32_as_transformers(loud, ids, name):
    """By the root of the mean square: the largest of 12,000 rounding errors is chance."""
    theirs, folder = loud(name)
    exact = hf_logits(theirs, ids)
    ours = load_model(folder, dtype=torch.bfloat16)(ids)
    half = type(theirs).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert ours.dtype == torch.bfloat16
    ours, half = (x.float().sub(exact).square().mean().sqrt() for x in (ours, hf_logits(half, ids)))
    assert ours < 1.1 * half


def attend_on_a_gpu() -> None:
    """Forward and backward, grouped queries: SDPA raises where it would fall back to the formula.
    Plain causal attention in bf16, which training is, gets the flash kernel."""
    for dtype, masked in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        fused = [SDPBackend.FLASH_ATTENTION]
        if masked or dtype == torch.float32:
            fused += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        q, k, v = (torch.randn(2, n, 37, 64, device="cuda", dtype=dtype) for n in (4, 2, 2))
        mask = torch.ones(2, 1, 37, 37, dtype=torch.bool, device="cuda").tril() if masked else None
        with sdpa_kernel(fused):
            attend(q.requires_grad_(), k, v, mask, 0.125, None).sum().backward()
        assert q.grad.isfinite().all(), (dtype, masked)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_attention_on_a_gpu_takes_a_fused_kernel():
    """In a process of its own, for this one sees no GPU."""
    path = f"{REPO}{os.pathsep}{REPO / 'tests'}"
    subprocess.run(
        [sys.executable, "-c", "import test_model; test_model.attend_on_a_gpu()"],
        env=SEES_GPU | {"PYTHONPATH": path}, check=True, timeout=300,
    )  # fmt: skip


def test_positions_stay_fp32_in_bfloat16(tiny_config):
    """bf16 has 8 bits: a position table rounded to it could not tell 100 from 101."""
    model = random_model(tiny_config).bfloat16()
    seen = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[1].cos_sin))
    model(torch.ones(1, 4, dtype=torch.int64))
    assert all(table.dtype == torch.float32 for table in seen[0][FULL])


class NoCopies(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses each operation that makes a tensor longer in its second dimension."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in ("repeat", "index_select", "expand")), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n_kv_heads", "queries"), [(8, 40), (2, 40), (2, 1)])
def test_groups_of_queries_have_the_bits_of_repeated_keys(dtype, masked, n_kv_heads, queries):
    """Forward without copies, and backward, where the keys are repeated."""
    if queries == 1 and not masked:
        pytest.skip("one query of many is no causal attention of all")
    torch.manual_seed(0)
    q = torch.randn(3, 8, queries, 24, dtype=dtype)
    k, v = torch.randn(2, 3, n_kv_heads, 40, 24, dtype=dtype).unbind()
    mask = torch.rand(3, 1, queries, 40) < 0.5 if masked else None
    if masked:
        mask[..., 0] = True  # no row without a key
    inputs = [x.requires_grad_() for x in (q, k, v)]
    many = [x.repeat_interleave(8 // n_kv_heads, dim=1) for x in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(
        q, *many, attn_mask=mask, is_causal=mask is None, scale=0.3
    )
    with torch.no_grad(), NoCopies():
        assert torch.equal(attend(q, k, v, mask, 0.3, None), want)
    got = attend(*inputs, mask, 0.3, None)
    assert torch.equal(got, want)
    found, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (got, want))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
