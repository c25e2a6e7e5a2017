"""Weights in 4 bits: those of transformers, with gradients, from either kind of checkpoint."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPO, difference, make_run, random_model, run_export
from safetensors.torch import load_file, save_file

import eval as evaluate
import train
from lofit.errors import InputError
from lofit.heads import attach_offsets, attached_offsets, edits_off
from lofit.inspect import explain
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ModelConfig
from lofit.llm.save import save_model
from lofit.run.tuned import open_tuned

bnb = pytest.importorskip("bitsandbytes", reason='needs pip install -e ".[test]"')
from lofit.quantize import Quantized, dequantized  # noqa: E402

IDS = torch.randint(3, 800, (2, 24), generator=torch.Generator().manual_seed(0))


def plain_twin(quantized):
    """A model in fp32 with the weights that the 4 bits stand for."""
    twin = load_model(quantized.source.name)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            twin.get_submodule(name).weight.data.copy_(dequantized(module))
    return twin


def test_a_pass_and_gradients_are_those_of_the_dequantised_weights(tiny_folder):
    """Twice: a pass without gradients may not change what a training step then computes."""
    ours = load_model(tiny_folder, way=Quantized)
    twin, heads = plain_twin(ours), [(1, 1), (2, 2)]
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in ours.modules()) == 3 * 7
    for _ in range(2):
        with torch.no_grad():
            assert difference(ours(IDS), twin(IDS)) < 1e-4
        found = []
        for model in (ours, twin):
            parameters = attach_offsets(model, heads, torch.full((2, 8), 0.1))
            model(IDS).log_softmax(-1)[:, :, 5].mean().backward()
            found.append(torch.cat([p.grad for p in parameters]))
        assert found[0].abs().max() > 0
        assert difference(*found) < 1e-5
        for model in (ours, twin):
            attach_offsets(model, heads, torch.zeros(2, 8))


@pytest.fixture
def stored(tiny_folder, tmp_path, transformers):
    """A checkpoint that transformers quantised, and its model."""
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, quantization_config=how
    )
    theirs.save_pretrained(tmp_path / "stored")
    return theirs, tmp_path / "stored"


def test_the_bits_are_those_of_transformers_and_its_checkpoints_are_read(stored, tiny_folder):
    theirs, folder = stored
    ours, read = load_model(tiny_folder, way=Quantized), load_model(folder)
    for name, module in ours.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            other = theirs.get_submodule(name).weight
            want = bnb.functional.dequantize_4bit(other.data, other.quant_state)
            assert torch.equal(dequantized(module), want), name
            assert torch.equal(dequantized(read.get_submodule(name)), want), name
    with torch.no_grad():
        assert difference(read(IDS), ours(IDS)) == 0
    assert read.source.fingerprint != ours.source.fingerprint


def test_what_offsets_write_is_told_of_a_checkpoint_in_4_bits(stored, tiny_folder, tmp_path):
    _, folder = stored
    shutil.copy(tiny_folder / "tokenizer.json", folder)
    run = tmp_path / "run"
    model = make_run(run, folder)
    explain.main([str(run)])
    found = json.loads((run / "explain.json").read_text())["offsets"]
    (layer, head), v = (each[0] for each in attached_offsets(model))
    weight = dequantized(model.model.layers[layer].self_attn.o_proj)
    want = (weight[:, 8 * head : 8 * head + 8] @ v).norm()
    (entry,) = (e for e in found if (e["layer"], e["head"]) == (layer, head))
    assert entry["written_norm"] == pytest.approx(want.item(), rel=1e-5)
    out = run_export(run, "peft", tmp_path / "out")
    assert (out / "adapter_model.safetensors").exists()
    with pytest.raises(InputError, match="--format hf: the base model is stored in 4 bits"):
        run_export(run, "hf", tmp_path / "whole")


def test_a_part_that_is_missing_and_other_kinds_are_refused(stored, tmp_path):
    _, folder = stored
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(InputError, match="up_proj.weight: statistics of 4 bits without"):
        load_model(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    with pytest.raises(InputError, match="the model is quantised"):
        ModelConfig.from_hf(raw)


def test_a_run_in_4_bits_says_so_everywhere(flags, tiny, tmp_path, capsys):
    run, same = tmp_path / "run", [*flags, "--dtype", "float32"]
    short = ["--heads", "random", "--top", "2", "--epochs", "1"]
    train.main([*short, *same, "--quantize", "nf4", "--run", str(run)])
    n = sum(p.numel() for p in tiny.parameters())
    assert f"{n:,} parameters" in capsys.readouterr().out  # not half as many, packed
    evaluate.main([*same, "--quantize", "nf4", "--run", str(run)])
    assert "warning" not in capsys.readouterr().err
    assert json.loads((run / "results.json").read_text())["settings"]["quantize"] == "nf4"
    evaluate.main([*same, "--run", str(run)])
    assert "trained with quantize nf4, evaluated with quantize None" in capsys.readouterr().err
    open_tuned(str(run))  # for an export, or to ask it
    assert "trained with quantize nf4; here the base model's weights" in capsys.readouterr().err


def test_a_copy_of_the_model_has_edits_of_its_own(tiny_folder):
    model = load_model(tiny_folder, way=Quantized)
    attach_offsets(model, [(2, 3)], torch.ones(1, 8))
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(IDS)
        with edits_off(model):
            assert difference(other(IDS), want) == 0


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import lofit.quantize
from lofit.llm.checkpoint import Whole, load_model
way = {"nf4": lofit.quantize.Quantized, "plain": Whole}[sys.argv[3]]
peak = lambda: next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if "VmHWM" in l)
before = peak()
model = load_model(sys.argv[2], "bfloat16", way=way)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_loading_never_holds_the_whole_model(tmp_path, tiny_config):
    """64 layers whose weights are most of the model: 4 bits are read with far less than bf16."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    save_model(random_model(replace(tiny_config, **sizes)), tmp_path / "big", torch.bfloat16)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory goes back at once
    peak = {}
    for way in ("nf4", "plain"):
        command = [sys.executable, "-c", PEAK, str(REPO), str(tmp_path / "big"), way]
        peak[way] = float(subprocess.run(command, env=env, capture_output=True, text=True).stdout)
    assert peak["nf4"] < 0.7 * peak["plain"], peak
