"""The two edits do what the paper's equations say, where they say it, and nothing else."""

import json

import pytest
import torch
from conftest import LOUD_GEMMAS, TOLERANCE, difference, random_model
from lofit.fast.folded import folded_offsets
from lofit.run.artefacts import load_heads, load_offsets, save_heads, save_offsets

from lofit.errors import InputError
from lofit.heads import (
    attach_offsets,
    attach_scales,
    attention_layers,
    edits_off,
    gather_offsets,
    head_scores,
    init_offsets,
    init_scales,
    lowest_edit,
    rank_heads,
)
from lofit.llm.checkpoint import load_model

HEADS = [(2, 1), (0, 3), (2, 0)]


@pytest.fixture
def ids():
    return torch.randint(3, 891, (2, 12), generator=torch.Generator().manual_seed(1))


def record_z(model) -> list[torch.Tensor]:
    """z of every layer, as the slot hands it on, in each forward pass to come."""
    seen = []
    for attention in attention_layers(model):
        attention.head_out.register_forward_hook(lambda _, inputs, out: seen.append(out.detach()))
    return seen


def test_zero_edits_are_bit_identical_to_none(tiny, ids):
    want = tiny(ids)
    attach_scales(tiny, torch.zeros(3, 4, 8))
    assert torch.equal(tiny(ids), want)
    attach_offsets(tiny, HEADS, torch.zeros(3, 8))
    assert torch.equal(tiny(ids), want)


def test_edits_equal_the_papers_formula_one_head_at_a_time(tiny, ids):
    """Layer 0 sees the same input in both models, so its z can be compared directly."""
    z = record_z(tiny)
    tiny(ids)
    scale, offset = torch.randn(3, 4, 8), torch.randn(4, 8)
    attach_scales(tiny, scale)
    scaled = record_z(tiny)
    tiny(ids)
    attach_offsets(tiny, [(0, h) for h in (3, 1, 0, 2)], offset)
    shifted = record_z(tiny)
    tiny(ids)
    for head, row in zip((3, 1, 0, 2), range(4), strict=True):
        by_hand = z[0][:, :, head]
        assert torch.equal(scaled[0][:, :, head], (1 + scale[0, head]) * by_hand)
        assert torch.equal(shifted[0][:, :, head], by_hand + offset[row])


@pytest.mark.parametrize("head", range(4))
def test_editing_a_head_changes_only_its_slice_of_z(tiny, ids, head):
    z = record_z(tiny)
    tiny(ids)
    attach_offsets(tiny, [(1, head)], torch.ones(1, 8))
    edited = record_z(tiny)
    tiny(ids)
    changed = [(a != b).flatten(0, 1).any(0).any(-1) for a, b in zip(z, edited, strict=True)]
    assert not changed[0].any()
    assert changed[1].tolist() == [h == head for h in range(4)]


def test_only_chosen_heads_get_gradient(tiny, ids):
    parameters = attach_offsets(tiny, HEADS, init_offsets(tiny, 3, 0))
    tiny(ids).square().sum().backward()
    assert {name for name, p in tiny.named_parameters() if p.grad is not None} == {
        "model.layers.0.self_attn.head_out.offset",
        "model.layers.2.self_attn.head_out.offset",
    }
    assert sum((p.grad != 0).sum().item() for p in parameters) == len(HEADS) * 8
    assert sum(p.numel() for p in tiny.parameters() if p.requires_grad) == len(HEADS) * 8


@pytest.mark.parametrize("name", ["gqa", *LOUD_GEMMAS])
@torch.no_grad()
def test_edited_logits_agree_with_transformers_and_a_hook(loud, ids, name):
    theirs, folder = loud(name)
    ours, ids = load_model(folder), ids % 100
    config = ours.config
    grid = (config.num_hidden_layers, config.num_attention_heads)
    scales, offsets = torch.randn(2, *grid, config.head_dim).unbind()

    def logits_of(edit):
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, i=i: (
                    edit(args[0].unflatten(-1, (grid[1], config.head_dim)), i).flatten(2),
                )
            )
            for i, layer in enumerate(theirs.model.layers)
        ]
        logits = theirs(ids).logits
        for handle in handles:
            handle.remove()
        return logits

    attach_scales(ours, scales)
    want = logits_of(lambda z, i: (1 + scales[i]) * z)
    assert difference(ours(ids), want) < TOLERANCE
    heads = [(i, h) for i in range(grid[0]) for h in range(grid[1])]
    attach_offsets(ours, heads, offsets.flatten(0, 1))
    want = logits_of(lambda z, i: z + offsets[i])
    assert difference(ours(ids), want) < TOLERANCE
    assert difference(want, theirs(ids).logits) > 1


@torch.no_grad()
def test_an_offset_equals_a_bias_behind_o_proj(tiny, tiny_config, ids):
    """z + v through o_proj is o_proj(z) + W_o v: how a tuned model is exported."""
    attach_offsets(tiny, HEADS, torch.randn(3, 8))
    live = tiny(ids)
    offsets = gather_offsets(tiny, HEADS)
    folded = random_model(tiny_config)
    for (layer, head), v in zip(HEADS, offsets, strict=True):
        o_proj = folded.model.layers[layer].self_attn.o_proj
        bias = o_proj.weight[:, head * 8 : (head + 1) * 8] @ v
        o_proj.register_forward_hook(lambda _, args, out, bias=bias: out + bias)
    assert difference(folded(ids), live) < TOLERANCE


@pytest.mark.parametrize("name", ["gqa", "biases", *LOUD_GEMMAS])
def test_folded_offsets_equal_live_ones(loud, ids, name):
    """And the edits come back, even after an error. A bias of o_proj that is there stays in."""
    model, ids = load_model(loud(name)[1]), ids % 101
    heads = [(0, 1), (2, 3), (2, 0)]
    attach_offsets(model, heads, torch.randn(3, model.config.head_dim))
    live = model(ids)
    with pytest.raises(ZeroDivisionError), folded_offsets(model):
        assert lowest_edit(model) == model.config.num_hidden_layers
        assert difference(model(ids), live) < TOLERANCE
        with edits_off(model):  # nothing left to switch off: the bias is part of the weights now
            assert difference(model(ids), live) < TOLERANCE
        raise ZeroDivisionError
    assert torch.equal(model(ids), live)
    with edits_off(model), folded_offsets(model):
        assert not torch.allclose(model(ids), live)


def test_the_lowest_edit(tiny):
    assert lowest_edit(tiny) == 3
    attach_offsets(tiny, [(2, 0), (1, 3)], torch.ones(2, 8))
    assert lowest_edit(tiny) == 1
    attach_scales(tiny, init_scales(tiny, 0))
    assert lowest_edit(tiny) == 0


def test_edits_off_is_the_base_model_even_after_an_error(tiny, ids):
    base = tiny(ids)
    attach_offsets(tiny, HEADS, torch.ones(3, 8))
    tuned = tiny(ids)
    with pytest.raises(ZeroDivisionError), edits_off(tiny):
        assert torch.equal(tiny(ids), base)
        raise ZeroDivisionError
    assert torch.equal(tiny(ids), tuned)
    assert not torch.equal(base, tuned)


def test_edits_stay_fp32_in_a_bfloat16_model(tiny_folder, ids):
    model = load_model(tiny_folder, dtype=torch.bfloat16)
    parameters = attach_scales(model, init_scales(model, 0))
    assert {p.dtype for p in parameters} == {torch.float32}
    assert model(ids).dtype == torch.bfloat16


def test_initial_values_follow_the_seed(tiny):
    A = init_scales(tiny, 7)
    assert A.shape == (3, 4, 8)
    assert torch.equal(A, init_scales(tiny, 7))
    assert not torch.equal(A, init_scales(tiny, 8))
    assert init_offsets(tiny, 5000, 7).std().item() == pytest.approx(1e-3, rel=0.05)


def test_ranking(tiny):
    scales = torch.zeros(3, 4, 8)
    scales[2, 1], scales[0, 3], scales[1, 0] = 3.0, -2.0, 0.5
    attach_scales(tiny, scales)
    scores = head_scores(tiny)
    assert scores[0, 3].item() == pytest.approx(2 * 8**0.5)  # the L2 norm: signs do not matter
    assert rank_heads(scores, 3) == [(2, 1), (0, 3), (1, 0)]
    assert rank_heads(torch.zeros(3, 4), 5) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_files_round_trip(tiny, tiny_folder, ids, tmp_path):
    info = {"model": "tiny", "fingerprint": tiny.source.fingerprint, "task": "mquake"}
    scores, offsets = torch.rand(3, 4), torch.randn(3, 8)
    save_heads(tmp_path / "heads.json", HEADS, scores, info)
    heads, read = load_heads(tmp_path / "heads.json", tiny)
    assert heads == HEADS and torch.equal(read, scores)
    attach_offsets(tiny, heads, offsets)
    tuned = tiny(ids)
    save_offsets(tmp_path / "o.safetensors", heads, gather_offsets(tiny, heads), info)
    other = load_model(tiny_folder)
    assert load_offsets(tmp_path / "o.safetensors", other) == (HEADS, info)
    assert torch.equal(other(ids), tuned)
    assert torch.equal(gather_offsets(other, HEADS), offsets)


def test_heads_of_another_model_are_refused(tiny, tiny_config, tmp_path):
    info = {"model": "another", "fingerprint": "0123"}
    save_heads(tmp_path / "heads.json", HEADS, torch.rand(3, 4), info)
    save_offsets(tmp_path / "o.safetensors", HEADS, torch.rand(3, 8), info)
    for load, name in ((load_heads, "heads.json"), (load_offsets, "o.safetensors")):
        with pytest.raises(InputError, match="made with another .*0123.* but this is .*tiny"):
            load(tmp_path / name, tiny)


@pytest.mark.parametrize(
    ("heads", "message"),
    [([], "no heads"), ([[3, 0]], "no head 0 in layer 3"), ([[0, 1], [0, 1]], "twice"),
     ("all", "malformed"), ([[1]], "malformed")],
)  # fmt: skip
def test_bad_heads_files_are_refused(tiny, tmp_path, heads, message):
    path = tmp_path / "heads.json"
    value = {"fingerprint": tiny.source.fingerprint, "heads": heads, "scores": [[0.0] * 4] * 3}
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        load_heads(path, tiny)


def test_offsets_of_a_wrong_shape_leave_the_model_alone(tiny, ids):
    before = tiny(ids)
    with pytest.raises(InputError, match="offsets: shape"):
        attach_offsets(tiny, HEADS, torch.ones(3, 7))
    assert torch.equal(tiny(ids), before)
