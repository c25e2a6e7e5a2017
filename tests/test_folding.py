"""The biases that offsets become, and every base and adapter that is refused."""

import json
import shutil

import pytest
import torch
from conftest import MINI, make_run, random_model, run_export
from lofit.run.artefacts import read_offsets
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lofit.errors import InputError
from lofit.llm.checkpoint import save_model
from lofit.llm.config import ModelConfig


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


def test_a_model_without_offsets_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="a model without offsets"):
        run_export(tiny_folder, "hf", tmp_path / "out")
