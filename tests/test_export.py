"""Exports against stock transformers and peft, and every run that is refused."""

import json
import logging
import shutil
import stat
import warnings

import huggingface_hub
import pytest
import torch
from conftest import (
    LOUD_MODELS,
    MINI,
    MINI_GEMMA,
    TOLERANCE,
    difference,
    make_run,
    random_model,
    run_export,
    slow_but,
)
from safetensors.torch import load_file, save_file

from lofit.compare.baselines import METHODS, attach_edits
from lofit.errors import InputError
from lofit.export import formats
from lofit.files import read_tensors, write_tensors
from lofit.heads import edits_off
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ModelConfig
from lofit.llm.save import save_model
from lofit.run.files import VERSION, save_edits

IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
MINIS = {"mini-llama": MINI, "mini-gemma": MINI_GEMMA}
WINDOWED = ("mistral-window", "qwen2-window")  # which no class of transformers can express
EXACT = 3e-5  # of logits of size 50 to 300, in float32


def load_stock(folder, caplog, dtype=torch.float32):
    """transformers' own loader; no missing key, no unexpected one, no warning."""
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    transformers.utils.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    assert not caplog.records
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    "name",
    slow_but(["gqa", "gemma2", "qwen2"], [n for n in (*MINIS, *LOUD_MODELS) if n not in WINDOWED]),
)
@torch.no_grad()
def test_transformers_computes_the_same_from_a_checkpoint(name, loud, tmp_path, caplog):
    base = MINIS.get(name) or loud(name)[1]
    ours = make_run(tmp_path / "run", base)
    want = ours(IDS)
    with edits_off(ours):
        assert difference(ours(IDS), want) > 0.1
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    stock = load_stock(out, caplog)
    assert difference(stock(IDS).logits, want) <= EXACT
    assert difference(load_model(out)(IDS), want) <= EXACT
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] is True and config["dtype"] == config["torch_dtype"]
    assert config["architectures"] == [type(stock).__name__]  # servers go by it alone
    assert "rope_theta" in config
    # nothing is left to chance: a bias for each projection of each layer, 0 where none is needed
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    added = {key for key, tensor in after.items() if tensor.any() and key not in before}
    changed = {key for key in before if key in after and not torch.equal(before[key], after[key])}
    edited = {f"model.layers.{layer}.self_attn.o_proj.bias" for layer, _ in heads_of(tmp_path)}
    assert added | changed == edited
    for layer in range(ours.config.num_hidden_layers):
        for which in "qkvo":
            assert f"model.layers.{layer}.self_attn.{which}_proj.bias" in after


def heads_of(tmp_path):
    return read_tensors(tmp_path / "run" / "offsets.safetensors")[0]["heads"].tolist()


PEFT = ("mini-llama", "gqa", "biases", "gemma2", "gemma3", "qwen2-window", "qwen3")


@pytest.mark.parametrize("name", slow_but(["mistral-window"], ["mistral-window", *PEFT]))
@torch.no_grad()
def test_stock_peft_computes_the_same_from_an_adapter(name, loud, tmp_path, caplog):
    """Several adapters in one model too, of other heads in other layers."""
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    base, wanted, outs = MINIS.get(name) or loud(name)[1], {}, {}
    for seed, adapter in enumerate(("one", "two")):
        wanted[adapter] = make_run(tmp_path / f"run-{adapter}", base, n=2, seed=seed)(IDS)
        outs[adapter] = run_export(tmp_path / f"run-{adapter}", "peft", tmp_path / adapter)
    assert difference(wanted["one"], wanted["two"]) > 0.1
    stock = load_stock(base, caplog)
    plain = stock(IDS).logits
    model = peft.PeftModel.from_pretrained(stock, outs["one"], adapter_name="one")
    model.load_adapter(outs["two"], "two")
    for adapter in ("one", "two", "one"):
        model.set_adapter(adapter)
        assert difference(model(IDS).logits, wanted[adapter]) <= TOLERANCE
    with model.disable_adapter():
        assert difference(model(IDS).logits, plain) == 0
    if name != "biases":
        with pytest.raises(Exception, match="bias"):  # the card says what to do instead
            model.merge_and_unload()


def make_baseline(folder, base, method):
    """A run of a baseline whose values are random; returns the model with its edits."""
    model = load_model(base)
    start = METHODS[method].edit.start(model.config, torch.Generator())
    generator = torch.Generator().manual_seed(0)
    edits = {
        f"layers.{i}.{part}": torch.randn(t.shape, generator=generator) / 4
        for i in range(model.config.num_hidden_layers)
        for part, t in start.items()
    }
    attach_edits(model, method, edits)
    source = model.source
    info = {"version": VERSION, "model": source.name, "fingerprint": source.fingerprint}
    info |= {"method": method, "settings": {"method": method}, "task": "mquake", "seed": 7}
    folder.mkdir(parents=True)
    save_edits(folder / "offsets.safetensors", model, info)
    return model


@pytest.mark.parametrize("method", ["lora", "lora_rank1"])
@pytest.mark.parametrize("name", slow_but(["gqa"], ["gqa", "mini-gemma"]))
@torch.no_grad()
def test_a_lora_is_a_lora_in_peft(name, method, loud, tmp_path, caplog):
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    base = MINIS.get(name) or loud(name)[1]
    ours = make_baseline(tmp_path / "run", base, method)
    want = ours(IDS)
    with edits_off(ours):
        assert difference(ours(IDS), want) > 0.1
    out = run_export(tmp_path / "run", "peft", tmp_path / "out")
    model = peft.PeftModel.from_pretrained(load_stock(base, caplog), out)
    assert difference(model(IDS).logits, want) <= EXACT
    assert difference(model.merge_and_unload()(IDS).logits, want) <= 10 * EXACT
    with pytest.raises(InputError, match=f"edits of {method} are no offsets; take --format peft"):
        run_export(tmp_path / "run", "hf", tmp_path / "whole")


@pytest.mark.slow
@torch.no_grad()
def test_the_text_half_of_a_gemma_3_that_sees_images(tmp_path, caplog):
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {"num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50}
    vision = sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=sizes | text, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    want = make_run(tmp_path / "run", tmp_path / "base")(IDS)
    whole = load_stock(run_export(tmp_path / "run", "hf", tmp_path / "out"), caplog)
    assert type(whole) is transformers.Gemma3ForCausalLM
    assert difference(whole(IDS).logits, want) <= EXACT
    adapter = run_export(tmp_path / "run", "peft", tmp_path / "adapter")
    tuned = peft.PeftModel.from_pretrained(load_stock(tmp_path / "base", caplog), adapter)
    assert difference(tuned(IDS).logits, want) <= EXACT


@torch.no_grad()
def test_shards_have_an_index_and_may_be_read(loud, tmp_path, caplog, monkeypatch):
    whole = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(
        formats.huggingface_hub, "save_torch_state_dict", lambda *a: whole(*a, max_shard_size=99999)
    )
    want = make_run(tmp_path / "run", loud("gqa")[1])(IDS)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 2 and (out / "model.safetensors.index.json").exists()
    for path in shards:
        assert path.stat().st_mode & stat.S_IROTH
    assert difference(load_stock(out, caplog)(IDS).logits, want) <= EXACT


def test_the_bias_is_that_of_the_weights_exported(tiny_folder, tmp_path):
    """Weights rounded to bfloat16 multiply v in fp32, and the product is rounded once."""
    make_run(tmp_path / "run", tiny_folder, n=12)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out", "--dtype", "bfloat16")
    found, exact = (load_file(f / "model.safetensors") for f in (out, tiny_folder))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors, _ = read_tensors(tmp_path / "run" / "offsets.safetensors")
    heads, v = tensors["heads"].tolist(), tensors["offsets"]
    for layer in range(3):
        whole = torch.cat([v[heads.index([layer, head])] for head in range(4)])
        stem = f"model.layers.{layer}.self_attn.o_proj."
        want, other = (w.float() @ whole for w in (found[f"{stem}weight"], exact[f"{stem}weight"]))
        assert torch.equal(found[f"{stem}bias"], want.bfloat16())
        assert not torch.equal(want.bfloat16(), other.bfloat16())


def test_a_link_out_of_the_base_folder_is_not_followed(tiny_folder, tmp_path):
    """An export is made to be given away: it must not take along what a link points to."""
    make_run(tmp_path / "run", tiny_folder)
    (tmp_path / "secret").write_text("secret")
    (tiny_folder / "tokenizer_secret").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="tokenizer_secret: a link that leaves the folder"):
        run_export(tmp_path / "run", "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tiny_folder / "tokenizer_secret").unlink()
    (tiny_folder / "tokenizer_link").symlink_to(tiny_folder / "tokenizer.json")
    run_export(tmp_path / "run", "hf", tmp_path / "out")  # a file like others


def rewrite(run, changed, **tensors):
    path = run / "offsets.safetensors"
    before, info = read_tensors(path)
    write_tensors(path, before | tensors, info | changed)


def other_weights(run, base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors")


def weights_too_large(run, base):
    model = random_model(ModelConfig.from_file(base / "config.json"))
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    save_model(model, base, torch.float32)
    make_run(run, base)


def another_method(run, base):
    shutil.rmtree(run)
    make_baseline(run, base, "red")


def a_window(run, base):
    config = json.loads((base / "config.json").read_text())
    mistral = {"model_type": "mistral", "sliding_window": 8}
    (base / "config.json").write_text(json.dumps(config | mistral))
    make_run(run, base)


FLOAT16 = ["--dtype", "float16"]


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda run, base: base.rename(run.parent / "elsewhere"), [],
         "run: its base model: .*no such folder.*; --model says where it is"),
        (other_weights, [],
         r"\([0-9a-f]{16}\), but .* has other weights \([0-9a-f]{16}\); --model names"),
        (lambda run, base: (run.parent / "out").write_text("mine"), [], "out: not an empty folder"),
        (lambda run, base: make_run(run.parent / "out", base), [], "out: not an empty folder"),
        (lambda run, base: make_run(run, base, scale=1e-10), FLOAT16,
         r"float16 would lose 1?\d\d% of the offsets in layer"),
        (lambda run, base: make_run(run, base, scale=1e7), FLOAT16,
         "float16 would lose all of the offsets in layer"),
        (weights_too_large, FLOAT16, "model.norm.weight has values that are not finite"),
        (lambda run, base: (run / "offsets.safetensors").rename(run / "heads.json"), [],
         "only step 1 was run; run train.py first"),
        (lambda run, base: (run / "offsets.safetensors").unlink(), [],
         "no such file; run train.py first"),
        (lambda run, base: shutil.rmtree(run), [], "run: no such folder"),
        (lambda run, base: rewrite(run, {"version": 1}), [],
         r"of another version of this program \(1, expected 2\); run train.py again"),
        (lambda run, base: rewrite(run, {"settings": 3}), [],
         "offsets.safetensors: missing or malformed"),
        (lambda run, base: rewrite(run, {}, heads=torch.tensor([[0, i] for i in range(5)])), [],
         "there is no head 4 in layer 0; the model has 3 layers of 4 heads"),
        (another_method, [],
         "--format hf: edits of red are no offsets; eval.py --offsets reads them"),
        (a_window, [], "mistral with a sliding window: .* take --format peft"),
    ],
)  # fmt: skip
def test_refused_with_nothing_left_behind(spoil, flags, message, tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    spoil(tmp_path / "run", tiny_folder)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        run_export(tmp_path / "run", "hf", tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
