"""What an offset writes: on a model made so that the answer is known."""

import json

import pytest
import torch
from conftest import LOUD_GEMMAS, MINI, difference, make_run

from lofit import load_tokenizer
from lofit.heads import attach_offsets
from lofit.inspect import explain
from lofit.llm.checkpoint import load_model


@pytest.fixture
def plain_speaker(tiny):
    """o_proj hands on what it gets, lm_head reads dimension i as token i: a head says what its
    offset has in it."""
    with torch.no_grad():
        for block in tiny.model.layers:
            block.self_attn.o_proj.weight.copy_(torch.eye(32))
        tiny.lm_head.weight.zero_()
        tiny.lm_head.weight[:32].copy_(torch.eye(32))
        tiny.model.norm.weight.fill_(1.0)
    return tiny


def test_the_tokens_are_those_of_the_offset(plain_speaker):
    tokenizer = load_tokenizer(MINI)
    offsets = torch.zeros(3, 8)
    offsets[0, 3], offsets[0, 5] = 2.0, -1.0  # head 1: dimensions 8 to 15
    offsets[1, 0], offsets[2, 0] = 1.0, 3.0  # heads 0 and 2 of one layer
    heads = [(2, 1), (1, 0), (1, 2)]
    attach_offsets(plain_speaker, heads, offsets)
    found = explain.explain(plain_speaker, tokenizer, 1)
    assert [(e["layer"], e["head"]) for e in found] == [(1, 0), (1, 2), (1, "all"), (2, 1)]
    assert [e["raises"][0][0] for e in found] == [tokenizer.token(i) for i in (0, 16, 16, 11)]
    assert found[2]["written_norm"] == pytest.approx(10**0.5)
    assert found[3]["lowers"][0][0] == tokenizer.token(13)
    assert found[3]["norm"] == pytest.approx(5**0.5) == found[3]["written_norm"]


def test_the_parts_are_what_an_offset_adds(tiny):
    """The heads' writes of a layer sum to the change of its attention's output."""
    ids = torch.tensor([[1, 5, 6, 7]])
    seen = []
    tiny.model.layers[0].self_attn.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    heads, v = [(0, 1), (0, 3)], torch.randn(2, 8)
    with torch.no_grad():
        tiny(ids)
        attach_offsets(tiny, heads, v)
        tiny(ids)
        shift = sum(
            explain.head_write(tiny, 0, h, row) for (_, h), row in zip(heads, v, strict=True)
        )
    assert difference(seen[1] - seen[0], shift.expand_as(seen[0])) < 1e-5


def test_gemma_norms_the_attention_output_before_it_is_added(loud):
    assert "gemma2" in LOUD_GEMMAS
    model = load_model(loud("gemma2")[1])
    shift = torch.randn(model.config.hidden_size)
    with torch.no_grad():
        normed = model.model.layers[0].post_attention_layernorm(shift)
        want = model.lm_head(model.model.norm(normed))
    assert difference(explain.lens(model, 0, shift), want) < 1e-5
    assert difference(explain.lens(model, 0, 7 * shift), want) < 1e-2  # its length is immaterial


def test_the_command_prints_and_writes(tiny_folder, tmp_path, capsys):
    make_run(tmp_path / "run", tiny_folder)
    explain.main([str(tmp_path / "run"), "--tokens", "3"])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "explain.json").read_text())
    heads = [e for e in found["offsets"] if e["head"] != "all"]
    assert len(heads) == 5 and all(len(e["raises"]) == 3 for e in found["offsets"])
    assert all(repr(e["raises"][0][0]) in printed for e in found["offsets"])
