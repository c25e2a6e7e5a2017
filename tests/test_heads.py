"""The two edits do what the paper's equations say, where they say it, and nothing else."""

import copy
import io
import json

import pytest
import torch
from conftest import LOUD_GEMMAS, TOLERANCE, difference

import lofit
from lofit.compare.baselines import METHODS, attach_edits
from lofit.errors import InputError
from lofit.heads import (
    attach_offsets,
    attach_scales,
    attached_offsets,
    attention_layers,
    edits_off,
    head_scores,
    random_init,
    rank_heads,
)
from lofit.llm.checkpoint import load_model
from lofit.run.files import load_heads, load_offsets, save_edits, save_heads, save_offsets

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
    """Layer 1 sees the same input in all models, so its z can be compared directly; an edit changes
    its own head's slice and no other."""

    def z_with(attach=None, *edit):
        if attach:
            attach(tiny, *edit)
        seen = record_z(tiny)
        tiny(ids)
        return seen

    z, scale, offset = z_with(), torch.zeros(3, 4, 8), torch.randn(4, 8)
    scale[1:] = torch.randn(2, 4, 8)
    scaled = z_with(attach_scales, scale)
    shifted = z_with(attach_offsets, [(1, h) for h in (3, 1, 0, 2)], offset)
    for row, head in enumerate((3, 1, 0, 2)):
        by_hand = z[1][:, :, head]
        assert torch.equal(scaled[1][:, :, head], (1 + scale[1, head]) * by_hand)
        assert torch.equal(shifted[1][:, :, head], by_hand + offset[row])
        alone = z_with(attach_offsets, [(1, head)], offset[[row]])
        changed = [(a != b).flatten(0, 1).any(0).any(-1) for a, b in zip(z, alone, strict=True)]
        assert not changed[0].any() and changed[1].tolist() == [h == head for h in range(4)]


def test_only_chosen_heads_get_gradient(tiny, ids):
    parameters = attach_offsets(tiny, HEADS, random_init(tiny, 3, 0))
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


def test_edits_off_is_the_base_model_even_after_an_error(tiny, ids):
    base = tiny(ids)
    attach_offsets(tiny, HEADS, torch.ones(3, 8))
    tuned = tiny(ids)
    with pytest.raises(ZeroDivisionError), edits_off(tiny):
        assert torch.equal(tiny(ids), base)
        raise ZeroDivisionError
    assert torch.equal(tiny(ids), tuned)
    assert not torch.equal(base, tuned)


def test_edits_stay_fp32_whatever_the_models_dtype(tiny_folder, ids, tmp_path):
    """Also when the model is cast after they were attached: what is saved can then be read."""
    model = load_model(tiny_folder, dtype="bfloat16")
    parameters = attach_scales(model, random_init(model, 12, 0).view(3, 4, 8))
    assert {p.dtype for p in parameters} == {torch.float32}
    assert model(ids).dtype == torch.bfloat16
    model = load_model(tiny_folder)
    offsets = torch.randn(3, 8)
    attach_offsets(model, HEADS, offsets)
    model.to(torch.bfloat16)
    assert model(ids).dtype == torch.bfloat16
    heads, found = attached_offsets(model)
    assert torch.equal(found, offsets[[HEADS.index(head) for head in heads]])
    save_offsets(tmp_path / "run", model)
    load_offsets(tmp_path / "run", load_model(tiny_folder))


def attach(model, name: str) -> None:
    """Something that changes what the model says: LoFiT's offsets, or a baseline's edits."""
    if name == "lofit":
        attach_offsets(model, HEADS, torch.ones(3, 8))
        return
    start = METHODS[name].edit.start(model.config, torch.Generator().manual_seed(0))
    attach_edits(model, name, {f"layers.1.{key}": t + 0.3 for key, t in start.items()})


@pytest.mark.parametrize("name", ["lofit", *(name for name in METHODS if METHODS[name].edit)])
@torch.no_grad()
def test_a_copy_of_a_model_has_edits_of_its_own(tiny, ids, name):
    """By deepcopy, and by torch.save and torch.load; switched off apart from the original's."""
    base = tiny(ids)
    attach(tiny, name)
    tuned = tiny(ids)
    assert difference(tuned, base) > 1e-3
    data = io.BytesIO()
    torch.save(tiny, data)
    data.seek(0)
    for other in (copy.deepcopy(tiny), torch.load(data, weights_only=False)):
        assert torch.equal(other(ids), tuned)
        for off, on in ((tiny, other), (other, tiny)):
            with edits_off(off):
                assert torch.equal(off(ids), base) and torch.equal(on(ids), tuned)
        for parameter in attention_layers(other)[1].head_out.parameters():
            parameter.add_(1.0)
        assert torch.equal(tiny(ids), tuned)


def test_initial_values_follow_the_seed(tiny):
    start = random_init(tiny, 12, 7)
    assert start.shape == (12, 8) and torch.equal(start, random_init(tiny, 12, 7))
    assert not torch.equal(start, random_init(tiny, 12, 8))
    assert random_init(tiny, 5000, 7).std().item() == pytest.approx(1e-3, rel=0.05)


def test_ranking(tiny):
    scales = torch.zeros(3, 4, 8)
    scales[2, 1], scales[0, 3], scales[1, 0] = 3.0, -2.0, 0.5
    attach_scales(tiny, scales)
    scores = head_scores(tiny)
    assert scores[0, 3].item() == pytest.approx(2 * 8**0.5)  # the L2 norm: signs do not matter
    assert rank_heads(scores, 3) == [(2, 1), (0, 3), (1, 0)]
    assert rank_heads(torch.zeros(3, 4), 5) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_files_round_trip(tiny, tiny_folder, ids, tmp_path):
    """By the public names of the package too; from a file, and from the folder of a run."""
    info = {"version": 2, "model": "tiny", "fingerprint": tiny.source.fingerprint, "settings": {}}
    scores, offsets = torch.rand(3, 4), torch.randn(3, 8)
    save_heads(tmp_path / "heads.json", HEADS, scores, info)
    heads, read, told = load_heads(tmp_path / "heads.json", tiny)
    assert heads == HEADS and torch.equal(read, scores) and told["model"] == "tiny"
    attach_offsets(tiny, heads, offsets)
    tuned = tiny(ids)
    save_edits(tmp_path / "a" / "offsets.safetensors", tiny, info)
    lofit.save_offsets(tmp_path / "b", tiny)
    lofit.save_offsets(tmp_path / "c.safetensors", tiny)
    for name in ("a", "a/offsets.safetensors", "b", "c.safetensors"):
        other = lofit.load_model(tiny_folder)
        found = lofit.load_offsets(str(tmp_path / name), other)
        assert found["fingerprint"] == tiny.source.fingerprint and found["trained_values"] == 24
        assert torch.equal(other(ids), tuned)


def test_a_list_of_ones_own_is_taken_as_it_is(tiny, tmp_path):
    own, path = [[2, 3], [1, 1]], tmp_path / "mine.json"
    for content in (own, {"heads": own}):
        path.write_text(json.dumps(content))
        assert load_heads(path, tiny) == ([(2, 3), (1, 1)], None, {})


@pytest.mark.parametrize(
    ("heads", "message"),
    [([], "at least one head"), ([[3, 0]], "no head 0 in layer 3"), ([[0, 1], [0, 1]], "twice"),
     ("all", "malformed"), ([[1]], "malformed"), ([[0, 1.5]], "malformed"), ([[0, -1]], "no head"),
     (None, "malformed")],
)  # fmt: skip
def test_bad_heads_files_are_refused(tiny, tmp_path, heads, message):
    path = tmp_path / "heads.json"
    value = {"fingerprint": tiny.source.fingerprint, "heads": heads, "scores": [[0.0] * 4] * 3}
    for content in (value, {"heads": heads}, *([heads] if isinstance(heads, list) else [])):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            load_heads(path, tiny)


def test_offsets_of_a_wrong_shape_leave_the_model_alone(tiny, ids):
    before = tiny(ids)
    with pytest.raises(InputError, match="offsets: shape"):
        attach_offsets(tiny, HEADS, torch.ones(3, 7))
    assert torch.equal(tiny(ids), before)
