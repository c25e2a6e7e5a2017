"""Exports against stock transformers and peft, our own adapter's round trip."""

import json
import logging
import shutil
import warnings

import pytest
import torch
from conftest import (
    LOUD_MODELS,
    MINI,
    MINI_GEMMA,
    REPO,
    TOLERANCE,
    difference,
    hf_model,
    make_run,
    run_export,
    slow_but,
)
from lofit.run.artefacts import load_offsets, save_offsets
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lofit.errors import InputError
from lofit.heads import edits_off, gather_offsets
from lofit.llm.checkpoint import load_model
from lofit.llm.generate import generate_all
from lofit.llm.tokenizer import load_tokenizer
from lofit.tasks import mquake

IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def quiet(tmp_path_factory):
    """name -> folder of a configuration with transformers' ordinary weights: rounding is small."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(f"quiet-{name}")
            hf_model(name).save_pretrained(made[name])
        return made[name]

    return make


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


MINIS = {"mini-llama": MINI, "mini-gemma": MINI_GEMMA}


@pytest.mark.parametrize("name", slow_but(["gqa", "gemma2"], [*MINIS, *LOUD_MODELS]))
@torch.no_grad()
def test_transformers_computes_the_same_from_a_checkpoint(name, quiet, tmp_path, caplog):
    ours = make_run(tmp_path / "run", MINIS.get(name) or quiet(name), scale=10.0)
    want = ours(IDS)
    with edits_off(ours):
        assert difference(ours(IDS), want) > 0.1
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    assert difference(load_stock(out, caplog)(IDS).logits, want) <= 1e-5
    assert difference(load_model(out)(IDS), want) <= 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] is True and config["dtype"] == config["torch_dtype"]
    assert "rope_theta" in config and "rope_parameters" in config
    keys = load_file(out / "model.safetensors")
    for layer in range(ours.config.num_hidden_layers):
        for which in "qkvo":
            assert f"model.layers.{layer}.self_attn.{which}_proj.bias" in keys


@pytest.mark.parametrize("name", slow_but(["gemma3"], LOUD_MODELS))
@torch.no_grad()
def test_also_with_large_weights(name, loud, tmp_path, caplog):
    want = make_run(tmp_path / "run", loud(name)[1])(IDS)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    assert difference(load_stock(out, caplog)(IDS).logits, want) <= TOLERANCE


@pytest.mark.parametrize("name", slow_but(["gqa"], [*MINIS, "gqa", "biases", "gemma2", "gemma3"]))
@torch.no_grad()
def test_stock_peft_computes_the_same_from_an_adapter(name, quiet, tmp_path, caplog):
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    base = MINIS.get(name) or quiet(name)
    want = make_run(tmp_path / "run", base, scale=10.0)(IDS)
    out = run_export(tmp_path / "run", "peft", tmp_path / "out")
    stock = load_stock(base, caplog)
    plain = stock(IDS).logits
    model = peft.PeftModel.from_pretrained(stock, out)
    assert difference(model(IDS).logits, want) <= 1e-5
    with model.disable_adapter():
        assert difference(model(IDS).logits, plain) == 0


@pytest.mark.parametrize("name", slow_but(["gqa"], ["gqa", "gemma3"]))
@torch.no_grad()
def test_peft_holds_several_adapters_and_changes_between_them(name, quiet, tmp_path, caplog):
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    base, wanted, outs = quiet(name), {}, {}
    for seed, adapter in enumerate(("one", "two")):  # of other heads, in other layers
        ours = make_run(tmp_path / f"run-{adapter}", base, scale=10.0, n=2, seed=seed)
        wanted[adapter] = ours(IDS)
        outs[adapter] = run_export(tmp_path / f"run-{adapter}", "peft", tmp_path / adapter)
    assert difference(wanted["one"], wanted["two"]) > 0.1
    stock = load_stock(base, caplog)
    plain = stock(IDS).logits
    model = peft.PeftModel.from_pretrained(stock, outs["one"], adapter_name="one")
    model.load_adapter(outs["two"], "two")
    for adapter in ("one", "two", "one"):
        model.set_adapter(adapter)
        assert difference(model(IDS).logits, wanted[adapter]) <= 1e-5
    with model.disable_adapter():
        assert difference(model(IDS).logits, plain) == 0
    with pytest.raises(Exception, match="bias"):  # the card says what to do instead
        model.merge_and_unload()


@pytest.mark.parametrize("name", slow_but(["gqa"], ["mini-llama", "gqa", "gemma2"]))
@torch.no_grad()
def test_steering_vectors_are_what_lm_eval_adds(name, quiet, tmp_path, caplog):
    """As lm-eval 0.4.13 hooks them: by name from the body on, added at every position."""
    base = MINIS.get(name) or quiet(name)
    want = make_run(tmp_path / "run", base, scale=10.0)(IDS)
    out = run_export(tmp_path / "run", "steered", tmp_path / "out")
    vectors = torch.load(out / "steering.pt", weights_only=True)
    stock = load_stock(base, caplog)
    modules = dict(stock.base_model.named_modules())
    for hookpoint, told in vectors.items():
        assert set(told) == {
            "steering_vector", "steering_coefficient", "action", "bias", "head_index",
        }  # fmt: skip
        assert (told["action"], told["bias"], told["head_index"]) == ("add", None, None)
        vector = told["steering_vector"] * told["steering_coefficient"]
        modules[hookpoint].register_forward_hook(lambda m, i, o, vector=vector: o + vector)
    assert difference(stock(IDS).logits, want) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_greedy_predictions_are_the_same(tmp_path, caplog):
    ours = make_run(tmp_path / "run", MINI, scale=4.0, n=13)
    stock = load_stock(run_export(tmp_path / "run", "hf", tmp_path / "out"), caplog)
    tokenizer = load_tokenizer(tmp_path / "out")
    examples = mquake.read(REPO / "data" / "mini", "test", 42, None)[:32]
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    eos = tokenizer.eos_ids
    for prompt, new in zip(prompts, generate_all(ours, prompts, 16, eos, 32, ""), strict=True):
        theirs = stock.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0]
        theirs = theirs[len(prompt) :].tolist()
        assert new == theirs[: theirs.index(eos[0])] if eos[0] in theirs else new == theirs


@pytest.mark.slow
@torch.no_grad()
def test_a_multimodal_gemma_3_keeps_its_other_half(tmp_path, caplog):
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
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    whole = load_stock(out, caplog)
    assert type(whole) is transformers.Gemma3ForConditionalGeneration
    assert difference(whole(IDS).logits, want) <= 1e-5
    assert difference(load_model(out)(IDS), want) <= 1e-5

    adapter = run_export(tmp_path / "run", "peft", tmp_path / "adapter")
    tuned = peft.PeftModel.from_pretrained(load_stock(tmp_path / "base", caplog), adapter)
    assert difference(tuned(IDS).logits, want) <= 1e-5
    steered = run_export(tmp_path / "run", "steered", tmp_path / "steered")
    names = dict(load_stock(tmp_path / "base", caplog).base_model.named_modules())
    assert torch.load(steered / "steering.pt", weights_only=True).keys() <= names.keys()


def split(folder):
    """Make two shards of a checkpoint, with q, k, v and o of one layer in different ones."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["gqa", "biases"])
@torch.no_grad()
def test_shards_and_their_index(name, quiet, tmp_path, caplog):
    base = shutil.copytree(quiet(name), tmp_path / "base")
    split(base)
    want = make_run(tmp_path / "run", base, scale=10.0)(IDS)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {key: (path.name, file.get_tensor(key).nbytes) for key in file.keys()}  # noqa: SIM118
    assert index["weight_map"] == {key: name for key, (name, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(n for _, n in found.values())
    assert difference(load_stock(out, caplog)(IDS).logits, want) <= 1e-5


def test_our_own_adapter_comes_back_byte_for_byte(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    out = run_export(tmp_path / "run", "lofit", tmp_path / "out")
    model = load_model(tiny_folder)
    heads, info = load_offsets(out / "offsets.safetensors", model)
    save_offsets(
        tmp_path / "again" / "offsets.safetensors", heads, gather_offsets(model, heads), info
    )
    for name in ("offsets.safetensors", "lofit_config.json"):
        first = (tmp_path / "run" / name).read_bytes()
        assert (out / name).read_bytes() == first == (tmp_path / "again" / name).read_bytes()
    told = json.loads((out / "lofit_config.json").read_text())
    assert told["heads"] == [list(head) for head in heads] and told["seed"] == 7


def test_32_heads_of_a_7b_model_are_16_kilobytes(tmp_path):
    heads = [(layer, 0) for layer in range(32)]
    save_offsets(tmp_path / "offsets.safetensors", heads, torch.randn(32, 128), {"model": "m"})
    assert 16384 <= (tmp_path / "offsets.safetensors").stat().st_size < 17500


def test_the_base_may_have_moved(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    moved = tiny_folder.rename(tmp_path / "moved")
    out = run_export(tmp_path / "run", "hf", tmp_path / "out", "--model", str(moved))
    assert (out / "tokenizer.json").read_bytes() == (moved / "tokenizer.json").read_bytes()


def test_an_export_names_its_architecture(tiny_folder, tmp_path):
    """Servers go by it alone; bases made out of other formats leave it out."""
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("architectures")
    path.write_text(json.dumps(config))
    make_run(tmp_path / "run", tiny_folder)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_our_own_format_has_one_dtype(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    with pytest.raises(InputError, match="offsets are float32"):
        run_export(tmp_path / "run", "lofit", tmp_path / "out", "--dtype", "bfloat16")


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
