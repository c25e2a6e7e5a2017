"""Loading and saving checkpoints, everything that can be wrong with one, and where they are put."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import LOUD_MODELS, MINI, REPO, difference
from safetensors.torch import load_file, save_file

from lofit.errors import InputError
from lofit.llm.checkpoint import digest, fingerprint, load_model
from lofit.llm.save import save_model
from lofit.run.setup import pick_dtype

IDS = torch.tensor([[1, 5, 9, 33, 7]])


def shard(folder):
    """Split model.safetensors in two, as large checkpoints come."""
    tensors, names = load_file(folder / "model.safetensors"), SHARDS
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: tensors[k] for k in tensors if weight_map[k] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return index


def test_a_loaded_model_is_frozen_and_in_eval_mode(tiny, tiny_folder):
    assert not tiny.training and tiny.source.name == str(tiny_folder)
    assert not any(p.requires_grad or p.is_meta for p in tiny.parameters())


def test_shards_and_old_files_with_rope_tables_load_alike(tiny, tiny_folder):
    path = tiny_folder / "model.safetensors"
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(path) | tables, path)
    assert torch.equal(load_model(tiny_folder)(IDS), tiny(IDS))
    shard(tiny_folder)
    sharded = load_model(tiny_folder)
    assert torch.equal(sharded(IDS), tiny(IDS))
    assert sharded.source.fingerprint == tiny.source.fingerprint


def test_the_fingerprint_sees_a_changed_row_of_any_tensor(tiny, tiny_folder):
    """The first, a middle and the last one, by the least that its dtype can tell."""
    found, tensors = {tiny.source.fingerprint}, load_file(tiny_folder / "model.safetensors")
    for key, tensor in tensors.items():
        for row in {0, len(tensor) // 2, len(tensor) - 1}:
            changed = tensor.clone()
            changed[row] = torch.nextafter(changed[row], torch.full_like(changed[row], math.inf))
            assert digest(changed) != digest(tensor), (key, row)
        found.add(fingerprint({k: digest(v) for k, v in tensors.items() if k != key}, tiny.config))
    assert len(found) == len(tensors) + 1
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2)) != digest(torch.zeros(6))


def test_fingerprint_sees_what_config_json_computes(tiny, tiny_folder):
    path, found = tiny_folder / "config.json", tiny.source.fingerprint
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"bos_token_id": 7}))
    assert load_model(tiny_folder).source.fingerprint == found
    path.write_text(json.dumps(raw | {"rms_norm_eps": 0.01}))
    assert load_model(tiny_folder).source.fingerprint != found


@pytest.mark.parametrize("name", LOUD_MODELS)
def test_what_we_save_transformers_loads(loud, tmp_path, name):
    theirs, folder = loud(name)
    ours = load_model(folder)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    save_model(ours, tmp_path / "saved", torch.float32)
    again = type(theirs).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert difference(again(IDS).logits, theirs(IDS).logits) < 1e-5
    assert torch.equal(load_model(tmp_path / "saved")(IDS), ours(IDS))


@pytest.mark.parametrize("version", [4, 5])
def test_a_multimodal_gemma_3_loads_as_its_text_part(loud, tmp_path, version):
    _, folder = loud("gemma3")
    tensors = load_file(folder / "model.safetensors")
    outer = {4: ("language_model.model.", ""), 5: ("model.language_model.", "model.")}[version]
    nested = {key.replace("model.", outer[0], 1): value for key, value in tensors.items()}
    for part in ("vision_tower.vision_model.x.weight", "multi_modal_projector.mm_input.weight"):
        nested[outer[1] + part] = torch.ones(2)
    save_file(nested, tmp_path / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    both, alone = load_model(tmp_path), load_model(folder)
    assert torch.equal(both(IDS), alone(IDS))
    assert both.source.fingerprint == alone.source.fingerprint


def test_transformers_own_multimodal_gemma_3_loads(tmp_path, transformers):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = sizes | {"num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 8}
    text["vocab_size"] = 50
    vision = sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    both = {"text_config": text, "vision_config": vision}
    config = transformers.Gemma3Config(**both, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert difference(load_model(tmp_path)(IDS), theirs(IDS).logits) < 1e-4


# how a folder is spoilt -> what the error says of it


def truncate(folder, n=-100):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n])


def lose(name):
    return lambda folder: (folder / name).unlink()


def lose_shard(folder):
    shard(folder)
    (folder / SHARDS[1]).unlink()


def name_shard(name):
    def edit(folder):
        index = shard(folder)
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map["model.norm.weight"] = name
        index.write_text(json.dumps({"weight_map": weight_map}))

    return edit


def edit_weights(key, change):
    """Put change(tensor of a key) in its place, ones where the key is new; None: take it away."""

    def edit(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors[key] = change(tensors.get(key, torch.ones(3)))
        save_file({k: v for k, v in tensors.items() if v is not None}, path, {"format": "pt"})

    return edit


def holding(value):
    def change(tensor):
        tensor[3, 5] = value
        return tensor

    return change


def tie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def pipe(folder):
    """Opening it would wait for ever."""
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
SPOILT = [
    (truncate, "model.safetensors: not readable .*is it whole"),
    (lambda folder: truncate(folder, 5), "model.safetensors: not readable .*is it whole"),
    (lose("model.safetensors"), "no model.safetensors"), (pipe, "no model.safetensors"),
    (lose("config.json"), "config.json: no such file"),
    (lose_shard, "model-00002-of-00002.safetensors: shard is missing"),
    (name_shard("../secret.safetensors"), "/tiny/secret.safetensors: shard is missing"),
    (name_shard("s" * 1000), "shard is missing"),
    (name_shard("a\0b"), "shard is missing"), (name_shard("\ud800"), "shard is missing"),
    (lambda folder: shard(folder).write_text("{}"), "key 'weight_map' is missing"),
    (edit_weights(NORM, lambda _: None), "lacks tensors model.norm.weight, 1 in all"),
    (edit_weights("model.extra", lambda t: t), "has an unknown tensor model.extra"),
    (edit_weights("norm.weight", lambda t: torch.ones(32)), "model.norm.weight is stored twice"),
    (edit_weights(NORM, lambda t: t[1:]), r"norm.weight is \[31\], config.json says \[32\]"),
    *((edit_weights(NORM, lambda t, kind=kind: t.to(kind)), "norm.weight is .*quantised.*dequanti")
      for kind in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    *((edit_weights(name.format(UP), lambda _: torch.ones(3)), "unknown tensor .*dequantize")
      for name in ("{}_scale", "{}.absmax", "{}.quant_state.bitsandbytes__nf4")),
    *((edit_weights(UP, holding(value)), f"{UP} has values that are not finite in .* or fetch it")
      for value in (math.nan, -math.inf)),
    (edit_weights(UP, lambda t: holding(1e300)(t.double())), "not finite in torch.float32; take"),
    (tie, 'lm_head.weight is not the embedding.*"tie_word_embeddings": false'),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_a_spoilt_folder_is_refused_by_name(tiny_folder, spoil, message):
    spoil(tiny_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tiny_folder)
    assert str(caught.value).startswith(str(tiny_folder))


def test_what_a_dtype_cannot_hold_is_refused(tiny_folder):
    edit_weights(UP, holding(1e5))(tiny_folder)
    models = [load_model(tiny_folder, dtype=kind) for kind in ("bfloat16", torch.bfloat16)]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.bfloat16}
    assert len({model.source.fingerprint for model in [*models, load_model(tiny_folder)]}) == 1
    with pytest.raises(InputError, match="not finite in torch.float16; take another --dtype"):
        load_model(tiny_folder, dtype="float16")
    for wrong in ("float8", "half", None, torch.int8):
        with pytest.raises(InputError, match="dtype .*expected one of float32, bfloat16, float16"):
            load_model(tiny_folder, dtype=wrong)


@pytest.mark.parametrize("body", ["model.", ""])
@pytest.mark.parametrize("ends", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_ways_to_store_a_tied_checkpoint(loud, tmp_path, body, ends):
    """The head alone is what safetensors' save_model keeps; no prefix is what the body alone has.
    transformers loads them all."""
    theirs, folder = loud("llama3-tied")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"] if ends == "both" else [ends]
    tensors |= {name: embedding.clone() for name in names}
    tensors = {key.replace("model.", body, 1): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    with torch.no_grad():
        again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")(IDS).logits
    assert difference(again, theirs(IDS).logits) == 0
    one, other = load_model(tmp_path), load_model(folder)
    assert torch.equal(one(IDS), other(IDS)) and one.source.fingerprint == other.source.fingerprint


def test_model_safetensors_goes_before_an_old_index(tiny_folder, transformers):
    """As in transformers: the shards are what another save left behind."""
    new = {k: v * 2 for k, v in load_file(tiny_folder / "model.safetensors").items()}
    index = shard(tiny_folder)
    save_file(new, tiny_folder / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for key, tensor in load_model(tiny_folder).state_dict().items():
        assert torch.equal(tensor, new[key]) and torch.equal(theirs[key], new[key])
    index.write_text("{")  # nor is it read
    load_model(tiny_folder)


# device, AMX, AVX-512's bf16, AMD, bytes, CUDA's capability -> the dtype
HARDWARE = [
    ("cpu", False, False, True, 10**9, None, torch.float32),
    ("cpu", False, True, True, 10**9, None, torch.bfloat16),
    ("cpu", False, True, True, 10**7, None, torch.float32),
    ("cpu", False, True, False, 10**9, None, torch.float32),
    ("cpu", True, False, False, 10**7, None, torch.bfloat16),
    ("cuda:1", False, False, False, 10**7, (8, 0), torch.bfloat16),
    ("cuda", True, True, True, 10**9, (7, 5), torch.float32),  # a T4 emulates it
    ("mps", True, True, True, 10**9, None, torch.float32),
]


@pytest.mark.parametrize("case", HARDWARE)
def test_dtype_auto_follows_the_hardware(monkeypatch, case):
    device, amx, avx, amd, n_bytes, capability, want = case
    asked = []
    for name, answer in {
        "torch.cpu._is_amx_tile_supported": lambda: amx,
        "torch.cpu._is_avx512_bf16_supported": lambda: avx,
        "lofit.run.setup._is_amd": lambda: amd,
        "torch.cuda.get_device_capability": lambda name: asked.append(name) or capability,
    }.items():
        monkeypatch.setattr(name, answer)
    assert pick_dtype("auto", device, n_bytes) == want
    assert asked == ([device] if device.startswith("cuda") else [])  # of several, that GPU
    assert pick_dtype("float16", device, n_bytes) == torch.float16


MISSING = """
import sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
import signal
for name in ("setitimer", "ITIMER_PROF", "SIGPROF"):
    delattr(signal, name)
import lofit
from lofit.llm import batches, chat, generate, scoring
import train
model, tokenizer = lofit.load_model(FOLDER), lofit.load_tokenizer(FOLDER)
ids = [tokenizer.encode("Q: What is the capital of it? A:")]
assert generate.generate(model, ids, 3, tokenizer.eos_ids)
"""


@pytest.mark.slow
def test_a_model_loads_without_the_modules_of_unix():
    """As on Windows, where Python has none of them."""
    code = f"FOLDER = {str(MINI)!r}\n" + MISSING
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert ended.returncode == 0, ended.stderr
