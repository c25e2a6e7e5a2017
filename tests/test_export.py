"""Exports against stock transformers and peft, and everything that an export refuses."""

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
    random_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lofit import export
from lofit.checkpoint import load_model, save_model
from lofit.config import ModelConfig
from lofit.errors import InputError
from lofit.generate import generate_all
from lofit.heads import edits_off, gather_offsets, load_offsets, read_offsets, save_offsets
from lofit.tasks import mquake
from lofit.tokenizer import load_tokenizer

IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))


def make_run(folder, base, scale=1.0, n=5, seed=0):
    """A run folder with random offsets for n heads of a model; returns the model with them."""
    model = load_model(base)
    layers, per_layer = model.config.num_hidden_layers, model.config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(layers * per_layer, generator=generator)[:n].tolist()
    heads = [divmod(i, per_layer) for i in order]
    offsets = torch.randn(n, model.config.head_dim, generator=generator) * scale
    source = model.source
    info = {"model": source.name, "revision": None, "fingerprint": source.fingerprint}
    info |= {"task": "mquake", "fold": None, "chat": False, "seed": 7, "settings": {"lr": 0.5}}
    folder.mkdir(parents=True, exist_ok=True)
    save_offsets(folder / "offsets.safetensors", heads, offsets, info)
    load_offsets(folder / "offsets.safetensors", model)
    return model


def run_export(run, form, out, *extra):
    export.main([str(run), "--format", form, "--out", str(out), *extra])
    return out


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


@pytest.mark.parametrize("name", [*MINIS, *LOUD_MODELS])
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


@pytest.mark.parametrize("name", LOUD_MODELS)
@torch.no_grad()
def test_also_with_large_weights(name, loud, tmp_path, caplog):
    want = make_run(tmp_path / "run", loud(name)[1])(IDS)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out")
    assert difference(load_stock(out, caplog)(IDS).logits, want) <= TOLERANCE


@pytest.mark.parametrize("name", [*MINIS, "gqa", "biases", "gemma2", "gemma3"])
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


@pytest.mark.parametrize("name", ["mini-llama", "gqa", "gemma2"])
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


def test_weights_stay_as_they_are_and_the_bias_is_rounded_once(tmp_path):
    ours = make_run(tmp_path / "run", MINI)
    base = load_file(MINI / "model.safetensors")
    out = load_file(run_export(tmp_path / "run", "hf", tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(out[key], tensor) for key, tensor in base.items())
    added = {key: tensor for key, tensor in out.items() if key not in base}
    assert {tensor.dtype for tensor in added.values()} == {torch.float32}
    for layer, block in enumerate(ours.model.layers):
        attention = block.self_attn
        edited = list(attention.head_out.parameters())
        stem = f"model.layers.{layer}.self_attn."
        assert bool(added[f"{stem}o_proj.bias"].any()) == bool(edited)
        assert not any(added[f"{stem}{which}_proj.bias"].any() for which in "qkv")
    half = run_export(tmp_path / "run", "hf", tmp_path / "bf16", "--dtype", "bfloat16")
    rounded = load_file(half / "model.safetensors")
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[key], value.bfloat16()) for key, value in added.items())
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_bias_is_that_of_the_weights_exported(tiny_folder, tmp_path):
    """Weights rounded to bfloat16 multiply v in fp32, and the product is rounded once."""
    make_run(tmp_path / "run", tiny_folder, n=12)
    out = run_export(tmp_path / "run", "hf", tmp_path / "out", "--dtype", "bfloat16")
    found, exact = (
        load_file(out / "model.safetensors"),
        load_file(tiny_folder / "model.safetensors"),
    )
    heads, v, _ = read_offsets(tmp_path / "run" / "offsets.safetensors")
    for layer in range(3):
        whole = torch.cat([v[heads.index((layer, head))] for head in range(4)])
        stem = f"model.layers.{layer}.self_attn.o_proj."
        want, other = (w.float() @ whole for w in (found[f"{stem}weight"], exact[f"{stem}weight"]))
        assert torch.equal(found[f"{stem}bias"], want.bfloat16())
        assert not torch.equal(want.bfloat16(), other.bfloat16())


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


# what is wrong -> what the error says


def no_base(run, base):
    base.rename(base.with_name("elsewhere"))
    return [], "its base model is missing"


def other_weights(run, base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path)
    return [], r"\(fingerprint [0-9a-f]{16}\), but .* now has [0-9a-f]{16}; --model names"


def full_folder(run, base):
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine.txt").write_text("mine")
    return [], "out: not an empty folder"


def a_file(run, base):
    (run.parent / "out").write_text("mine")
    return [], "out: not an empty folder"


def offsets_too_small(run, base):
    make_run(run, base, scale=1e-10)
    return ["--dtype", "float16"], r"--dtype float16 would lose 1?\d\d% of the offsets in layer"


def offsets_too_large(run, base):
    make_run(run, base, scale=1e7)
    return ["--dtype", "float16"], "--dtype float16 would lose all of the offsets in layer"


def weights_too_large(run, base):
    model = random_model(ModelConfig.from_file(base / "config.json"))
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    save_model(model, base, torch.float32)
    make_run(run, base)
    return ["--dtype", "float16"], "model.norm.weight has values too large"


def scales_alone(run, base):
    (run / "offsets.safetensors").rename(run / "heads.json")
    return [], "scales alone .*nor can a bias express a scale; run train.py first"


def nothing(run, base):
    (run / "offsets.safetensors").unlink()
    return [], "no offsets.safetensors in it; expected a run folder or an adapter"


def folds(run, base):
    shutil.copytree(run, run / "fold0")
    (run / "offsets.safetensors").unlink()
    return [], "a run of several folds; name one of them"


def a_head_too_many(run, base):
    rewrite(run, heads=torch.tensor([[0, 0], [0, 9], [1, 1], [1, 2], [2, 0]]))
    return [], "there is no head 9 in layer 0; the model has 3 layers of 4 heads"


def heads_that_do_not_match(run, base):
    rewrite(run, heads=torch.tensor([[0, 0]]))
    return [], r"expected one \(layer, head\) for each offset"


def rewrite(run, **tensors):
    path = run / "offsets.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "spoil",
    [
        no_base, other_weights, full_folder, a_file, offsets_too_small, offsets_too_large,
        weights_too_large, scales_alone, nothing, folds, a_head_too_many, heads_that_do_not_match,
    ],
)  # fmt: skip
def test_refused_with_nothing_left_behind(spoil, tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    flags, message = spoil(tmp_path / "run", tiny_folder)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        run_export(tmp_path / "run", "hf", tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_the_base_may_have_moved(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    moved = tiny_folder.rename(tmp_path / "moved")
    out = run_export(tmp_path / "run", "hf", tmp_path / "out", "--model", str(moved))
    assert (out / "tokenizer.json").read_bytes() == (moved / "tokenizer.json").read_bytes()


def test_a_model_without_offsets_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="a model without offsets"):
        run_export(tiny_folder, "hf", tmp_path / "out")


def test_our_own_format_has_one_dtype(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    with pytest.raises(InputError, match="offsets are float32"):
        run_export(tmp_path / "run", "lofit", tmp_path / "out", "--dtype", "bfloat16")


def test_the_card_says_what_it_is(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", tiny_folder)
    (tiny_folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n")
    card = (run_export(tmp_path / "run", "peft", tmp_path / "one") / "README.md").read_text()
    for text in ("license: other", "license_name: mine", "library_name: peft", "pipeline_tag: text",
                 "| task | mquake |", "| seed | 7 |", "lr 0.5", "Not evaluated",
                 f'from_pretrained("{tiny_folder}")', '"one")'):  # fmt: skip
        assert text in card
    assert "base_model:" not in card  # a path is no name on the hub
    (tmp_path / "owner").mkdir()
    tiny_folder.rename("owner/name")
    named = ["--model", "owner/name"]
    card = (run_export(tmp_path / "run", "peft", tmp_path / "id", *named) / "README.md").read_text()
    assert "\nbase_model: owner/name\n" in card and "- base_model:adapter:owner/name\n" in card
    card = (run_export(tmp_path / "run", "hf", tmp_path / "hf", *named) / "README.md").read_text()
    assert "\nbase_model: owner/name\n" in card and "base_model:adapter" not in card
    assert "vLLM" not in card
    told = json.loads((tmp_path / "run" / "lofit_config.json").read_text())
    change = {"em": {"value": 0.5, "ci95": [0.4, 0.6]}}
    results = {"fingerprint": told["fingerprint"], "heads": told["heads"], "task": "mquake"}
    results |= {"split": "test", "n": 9, "base": {"em": 0.25}, "tuned": {"em": 0.75}}
    path = tmp_path / "run" / "results.json"
    path.write_text(json.dumps(results | {"difference": change}))
    card = (
        run_export(tmp_path / "run", "lofit", tmp_path / "two", *named) / "README.md"
    ).read_text()
    assert "mquake, test split, 9 items" in card and "25.0%    75.0%   +50.0 [+40.0, +60.0]" in card
    path.write_text(json.dumps(results | {"difference": change, "heads": [[0, 0]]}))  # of others
    card = (
        run_export(tmp_path / "run", "lofit", tmp_path / "three", *named) / "README.md"
    ).read_text()
    assert "Not evaluated" in card


def test_the_card_of_a_gemma_1_warns_of_vllm(tmp_path):
    for base, form, warned in (
        (MINI_GEMMA, "hf", True), (MINI_GEMMA, "peft", False), (MINI, "hf", False),
    ):  # fmt: skip
        make_run(tmp_path / "run", base)
        out = run_export(tmp_path / "run", form, tmp_path / f"{base.name}-{form}")
        assert ("Not with vLLM" in (out / "README.md").read_text()) is warned


def test_push_to_hub(tiny_folder, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", tiny_folder)
    calls = []

    class Api:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, repo, exist_ok):
            calls.append(repo)
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, repo_id, folder_path):
            calls.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr(export.huggingface_hub, "HfApi", Api)
    out = run_export(tmp_path / "run", "peft", tmp_path / "out", "--push-to-hub", "me/tuned")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert calls == ["whoami", "me/tuned", files]
    assert "https://huggingface.co/me/tuned" in capsys.readouterr().out
    assert 'from_pretrained(base, "me/tuned")' in (out / "README.md").read_text()

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(Api, "upload_folder", fail)
    with pytest.raises(InputError, match="no network; .* is complete: upload it with"):
        run_export(tmp_path / "run", "peft", tmp_path / "kept", "--push-to-hub", "me/tuned")
    assert (tmp_path / "kept" / "adapter_config.json").exists()
    monkeypatch.setattr(Api, "whoami", fail)
    for repo in ("me/tuned", "not an id"):
        with pytest.raises(InputError, match="set HF_TOKEN"):
            run_export(tmp_path / "run", "peft", tmp_path / "new", "--push-to-hub", repo)
    assert not (tmp_path / "new").exists()


def test_the_hub_is_asked_before_any_work(tmp_path):
    with pytest.raises(InputError, match="--push-to-hub me/tuned: .*set HF_TOKEN"):  # offline here
        run_export(tmp_path / "none", "peft", tmp_path / "out", "--push-to-hub", "me/tuned")
