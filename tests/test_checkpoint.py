"""Loading and saving checkpoints, and everything that can be wrong with one."""

import json
import os
import shutil

import pytest
import torch
from conftest import LOUD_GEMMAS, LOUD_MODELS, MINI, REPO, difference
from safetensors.torch import load_file, save_file

from lofit.errors import InputError
from lofit.llm.checkpoint import find_folder, load_model, save_model, weight_files
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.arguments import common_parser, run_folder

IDS = torch.tensor([[1, 5, 9, 33, 7]])


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Split model.safetensors in two, as large checkpoints come."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: tensors[k] for k in tensors if weight_map[k] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return index


def test_loaded_model_is_frozen_and_in_eval_mode(tiny, tiny_folder):
    assert not tiny.training
    assert not any(p.requires_grad for p in tiny.parameters())
    assert not any(p.is_meta for p in tiny.parameters())
    assert tiny.source.name == str(tiny_folder)


def test_the_state_dict_is_the_checkpoint(loud):
    for name in LOUD_MODELS:
        theirs, folder = loud(name)
        assert load_model(folder).state_dict().keys() == theirs.state_dict().keys()


def test_shards_load_like_one_file(tiny, tiny_folder):
    shard(tiny_folder)
    sharded = load_model(tiny_folder)
    assert torch.equal(sharded(IDS), tiny(IDS))
    assert sharded.source.fingerprint == tiny.source.fingerprint


def test_fingerprint_tells_weights_apart(tiny, tiny_folder):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(tensors, path)
    assert load_model(tiny_folder).source.fingerprint != tiny.source.fingerprint


def test_fingerprint_sees_what_config_json_computes(tiny, tiny_folder):
    path, found = tiny_folder / "config.json", tiny.source.fingerprint
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"bos_token_id": 7}))
    assert load_model(tiny_folder).source.fingerprint == found
    path.write_text(json.dumps(raw | {"rms_norm_eps": 0.01}))
    assert load_model(tiny_folder).source.fingerprint != found


@pytest.mark.parametrize("name", ["llama3-tied", "gqa", "yarn-all", *LOUD_GEMMAS])
def test_what_we_save_transformers_loads(loud, tmp_path, name):
    theirs, folder = loud(name)
    save_model(load_model(folder), tmp_path / "saved", torch.float32)
    again = type(theirs).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert difference(again(IDS).logits, theirs(IDS).logits) < 1e-5
    assert torch.equal(load_model(tmp_path / "saved")(IDS), load_model(folder)(IDS))


def test_tied_heads_share_memory(loud):
    model = load_model(loud("llama3-tied")[1])
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_rope_tables_of_old_files_are_dropped(tiny, tiny_folder):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path)
    assert torch.equal(load_model(tiny_folder)(IDS), tiny(IDS))


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


def test_transformers_own_multimodal_gemma_3_loads(tmp_path):
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = sizes | {
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 50,
    }
    vision = sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert difference(load_model(tmp_path)(IDS), theirs(IDS).logits) < 1e-4


@pytest.mark.parametrize("name", ["llama3-tied", "yarn-all", "gemma-mqa", "gemma2", "gemma3"])
def test_both_generations_of_config_files_give_identical_logits(loud, tmp_path, name):
    """transformers 5 wrote the folder; its config.json as transformers 4 would have written it."""
    _, folder = loud(name)
    new = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in new and "rope_theta" not in new
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    rope = dict(new["rope_parameters"])
    if name == "gemma3":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 6
        rope = dict(rope["full_attention"])
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "float32"}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert torch.equal(load_model(tmp_path)(IDS), load_model(folder)(IDS))


def test_the_dtype_is_the_one_asked_for(tiny_folder):
    assert {p.dtype for p in load_model(tiny_folder, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


# what is wrong with the folder -> what the error says


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors: not a whole safetensors file"


def truncate_header(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 5)
    return "model.safetensors: not a whole safetensors file"


def remove_weights(folder):
    (folder / "model.safetensors").unlink()
    return "no model.safetensors"


def remove_config(folder):
    (folder / "config.json").unlink()
    return "config.json: no such file"


def remove_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors: shard is missing"


def leave_the_folder(folder):
    index = shard(folder)
    secret = folder.parent / "secret.safetensors"
    shutil.move(folder / "model-00002-of-00002.safetensors", secret)
    text = index.read_text().replace("model-00002-of-00002", "../secret")
    index.write_text(text)
    return r"shard path '../secret.safetensors' leaves the folder"


def absolute_path(folder):
    index = shard(folder)
    target = folder / "model-00002-of-00002.safetensors"
    index.write_text(index.read_text().replace(target.name, str(target)))
    return "leaves the folder"


def empty_index(folder):
    shard(folder).write_text("{}")
    return "no weight_map"


def edit_tensors(change):
    def edit(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        message = change(tensors)
        save_file(tensors, path)
        return message

    return edit


@edit_tensors
def lack_a_tensor(tensors):
    del tensors["model.norm.weight"]
    return "lacks tensors model.norm.weight"


@edit_tensors
def have_more_tensors(tensors):
    for i in range(5):
        tensors[f"model.extra.{i}"] = torch.ones(1)
    return "has unknown tensors model.extra.0, model.extra.1, model.extra.2 and 2 more"


@edit_tensors
def have_a_wrong_shape(tensors):
    tensors["model.norm.weight"] = torch.ones(31)
    return r"model.norm.weight is \[31\], config.json says \[32\]"


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin: pickled weights are never loaded; .*save_pretrained"


@pytest.mark.parametrize(
    "spoil",
    [truncate, truncate_header, remove_weights, remove_config, remove_shard, leave_the_folder,
     absolute_path, empty_index, lack_a_tensor, have_more_tensors, have_a_wrong_shape, pickle_only],
    ids=lambda f: getattr(f, "__name__", "edit"),
)  # fmt: skip
def test_a_spoilt_folder_is_refused_by_name(tiny_folder, spoil):
    message = spoil(tiny_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tiny_folder)
    assert "\n" not in str(caught.value)
    assert str(tiny_folder) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./nowhere", "nowhere", "/nowhere/else", "owner/not-in-the-cache"]
)
def test_a_name_that_is_nothing_is_refused(name):
    with pytest.raises(InputError, match=name):
        find_folder(name)


def test_a_file_is_no_folder(tiny_folder):
    with pytest.raises(InputError, match="no such folder"):
        find_folder(tiny_folder / "config.json")


def test_a_pickle_is_not_opened(tiny_folder, tmp_path):
    """A .bin that would write a file on unpickling is named and left alone."""
    import os
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="never loaded"):
        load_model(tiny_folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_refused(tiny_folder, kind):
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(kind)
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model.norm.weight is [A-Z].*float32, .*quantised.*dequ"):
        load_model(tiny_folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tiny_folder, value):
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight has values that are not"):
        load_model(tiny_folder)


def test_a_head_of_its_own_is_not_dropped_where_the_config_ties_it(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(
        InputError, match='lm_head.weight is not the embedding.*"tie_word_embeddings": false'
    ):
        load_model(tiny_folder)
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    load_model(tiny_folder)  # stored twice, but the same


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
    assert torch.equal(load_model(tmp_path)(IDS), load_model(folder)(IDS))


def test_a_tensor_that_is_stored_twice_is_refused(tiny_folder):
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="tensor model.norm.weight is stored twice"):
        load_model(tiny_folder)


def test_model_safetensors_goes_before_an_old_index(tiny_folder):
    """As in transformers: the shards are what another save left behind."""
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    new = {k: v * 2 for k, v in load_file(tiny_folder / "model.safetensors").items()}
    index = shard(tiny_folder)
    save_file(new, tiny_folder / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for key, tensor in load_model(tiny_folder).state_dict().items():
        assert torch.equal(tensor, new[key]) and torch.equal(theirs[key], new[key])
    index.write_text("{")  # nor is it read
    load_model(tiny_folder)


SCALES = ["{}_scale", "{}_scale_inv", "{}.absmax", "{}.quant_state.bitsandbytes__nf4"]


@pytest.mark.parametrize("name", [*SCALES, "model.layers.0.mlp.up_proj.qweight"])
def test_a_checkpoint_that_is_quantised_is_named_so(tiny_folder, name):
    """By what it stores beside its weights, where config.json does not say it."""
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors[name.format("model.layers.0.mlp.up_proj.weight")] = torch.ones(3)
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="has unknown tensors .*quantised; take the checkpoint"):
        load_model(tiny_folder)


def test_a_weight_of_eight_bits_is_named_quantised(tiny_folder):
    tensors = load_file(tiny_folder / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="up_proj.weight is F8_E4M3; .*quantised, take the"):
        load_model(tiny_folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
OTHERS = {  # what a folder holds instead of a checkpoint -> what the error says
    "adapter_config.json": "adapter_config.json: a peft adapter, no model: name its base",
    "consolidated.00.pth": "consolidated.00.pth: weights in Meta's own format",
    "tiny-Q4_K_M.gguf": "tiny-Q4_K_M.gguf: a GGUF file .*gguf_file=NAME",
    "pytorch_model.bin": "pytorch_model.bin: pickled weights are never loaded",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_is_named_for_what_it_is(tiny_folder, tmp_path, name, with_config):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("{}")
    (tmp_path / "other" / "adapter_model.safetensors").write_text("")
    if with_config:
        shutil.copy(tiny_folder / "config.json", tmp_path / "other")
    for read in (load_model, weight_files):
        with pytest.raises(InputError, match=OTHERS[name]):
            read(tmp_path / "other")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"]
)
def test_a_pointer_of_git_lfs_is_named(tiny_folder, name):
    if name == "tokenizer.model":
        (tiny_folder / "tokenizer.json").unlink()
    (tiny_folder / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name}: a git-LFS pointer, .*git lfs pull"):
        load_model(tiny_folder)
        load_tokenizer(tiny_folder)


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "cure"),
    [
        (1e300, torch.float64, torch.float32, "above 3.4e[+]38, too large for float32; no dtype"),
        (-1e300, torch.float64, torch.bfloat16, "too large for bfloat16; no dtype"),
        (1e5, torch.float32, torch.float16, "above 6.55e[+]04, .*float16; take --dtype bfloat16"),
        (-1e6, torch.bfloat16, torch.float16, "float16; take --dtype bfloat16"),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(tiny_folder, value, stored, dtype, cure):
    tensors = load_file(tiny_folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(stored)
    tensors[key][3, 5] = value
    save_file(tensors, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{key} has values .*{cure}"):
        load_model(tiny_folder, dtype=dtype)


@pytest.mark.parametrize("shard_name", ["s" * 1000, "a\0b", "\ud800"])
def test_a_shard_name_that_no_file_can_have(tiny_folder, shard_name):
    index = shard(tiny_folder)
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": shard_name}}))
    with pytest.raises(InputError, match="shard is missing"):
        load_model(tiny_folder)
    with pytest.raises(InputError, match="no such folder"):
        find_folder(shard_name)


def test_the_shipped_models_are_found_from_anywhere(tmp_path, monkeypatch):
    """And a name that begins as they do is never asked of the hub, where others could register
    it."""
    monkeypatch.setattr("lofit.llm.folder.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    assert find_folder("weights/mini-llama") == MINI
    args = common_parser("").parse_args([])
    assert args.data == REPO / "data" / "mini" and run_folder(args).parts[1] == "mini-llama"
    for name in ("weights/mini-lama", "runs/mini-llama", "data/mini-llama", "weights/a/b"):
        with pytest.raises(InputError, match=f"{name}: no such folder"):
            find_folder(name)
    mine = tmp_path / "weights" / "mini-llama"
    mine.mkdir(parents=True)
    assert find_folder("weights/mini-llama").resolve() == mine.resolve()


def test_a_pipe_is_no_shard(tiny_folder):
    """Opening it would wait for ever."""
    (tiny_folder / "model.safetensors").unlink()
    os.mkfifo(tiny_folder / "model.safetensors")
    with pytest.raises(InputError, match="no model.safetensors"):
        load_model(tiny_folder)
