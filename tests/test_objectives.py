"""What tasks train on, in whole batches and in parts; and one step of training."""

import math

import pytest
import torch
from conftest import difference
from safetensors.torch import load_file

import train
from lofit import evaluation
from lofit.errors import InputError
from lofit.fast.hidden_cache import HiddenCache
from lofit.heads import attach_offsets, edits_off
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import Accumulated, CrossEntropy, Preference, mean_loss
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step

HEADS = [(2, 1), (0, 3)]


@pytest.fixture
def tokenizer(tiny_folder):
    return load_tokenizer(tiny_folder)


PAIRS = [
    ("Q: Who is it? A:", "the capital", "city"),
    ("Q: What is the sport of it? A:", "city", "the capital of the country"),
    ("Q: Is it? A:", "country", "sport"),
]
TEXTS = [pair[:2] for pair in PAIRS]
TEXTS_OF = {CrossEntropy: TEXTS, Preference: PAIRS}


def loss_of(objective, rows):
    return objective.loss(objective.batch(rows))


def test_the_mean_loss_weighs_batches_by_what_they_are_a_mean_of(tiny, tokenizer):
    for kind in (CrossEntropy, Preference):
        objective = kind(tiny, tokenizer, TEXTS_OF[kind])
        attach_offsets(tiny, HEADS, torch.ones(2, 8))
        whole = loss_of(objective, [0, 1, 2]).item()
        assert mean_loss(objective, 2) == pytest.approx(whole, abs=1e-5)
        assert mean_loss(objective, 64) == pytest.approx(whole, abs=1e-5)


def test_the_reference_is_the_base_model_even_if_an_edit_is_there(tiny, tokenizer):
    """And without an edit DPO cannot tell policy from reference."""
    base = Preference(tiny, tokenizer, PAIRS).reference
    attach_offsets(tiny, HEADS, torch.ones(2, 8))
    edited = Preference(tiny, tokenizer, PAIRS)
    assert torch.equal(edited.reference, base)
    assert loss_of(edited, [0, 1, 2]).item() != pytest.approx(math.log(2), abs=1e-3)
    with edits_off(tiny):
        assert loss_of(edited, [0, 1, 2]).item() == pytest.approx(math.log(2))


def test_too_long_an_example_is_named(tiny, tokenizer):
    long = ("Q: " + "the " * 260 + "A:", "city", "city")
    for kind, n in ((CrossEntropy, 2), (Preference, 3)):
        texts = [t[:n] for t in (PAIRS[0], long)]
        with pytest.raises(InputError, match=r"b.jsonl, line 7: 26. tokens, more than .*\(256\)"):
            kind(tiny, tokenizer, texts, 256, ("a.jsonl, line 1", "b.jsonl, line 7"))


def gradients(model, objective, heads, rows):
    """Loss and gradients at some offsets, twice: what is kept from the first time serves then."""
    torch.manual_seed(0)
    parameters = attach_offsets(model, heads, torch.randn(len(heads), model.config.head_dim))
    for _ in range(2):
        for p in parameters:
            p.grad = None
        loss = loss_of(objective, rows)
        loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("kind", [CrossEntropy, Preference])
@pytest.mark.parametrize("heads", [[(2, 1), (0, 3)], [(2, 1), (2, 3)], [(1, 0)]])
def test_the_fast_way_agrees_with_the_plain_one(tiny, tokenizer, kind, heads):
    """Gradients too; after the first time the layers below the lowest head are not run again."""
    plainly = {"plain": True} if kind is Preference else {}
    plain = kind(tiny, tokenizer, TEXTS_OF[kind], **plainly)
    fast = HiddenCache(kind(tiny, tokenizer, TEXTS_OF[kind]))
    want, want_grad = gradients(tiny, plain, heads, [2, 0])
    loss, grad = gradients(tiny, fast, heads, [2, 0])
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert difference(grad, want_grad) < 1e-5 * want_grad.abs().max()
    lowest = min(layer for layer, _ in heads)
    assert set(fast.kept) == ({0, 2} if lowest else set())
    calls = []
    tiny.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    loss_of(fast, [0, 2])
    assert len(calls) == (0 if lowest else 1)
    loss_of(fast, [0, 1])  # one of these is new
    assert len(calls) == (1 if lowest else 2)


def test_kept_states_are_bounded_and_follow_the_heads(tiny, tokenizer):
    objective = CrossEntropy(tiny, tokenizer, TEXTS)
    attach_offsets(tiny, [(1, 0)], torch.ones(1, 8))
    n_bytes = [4 * 32 * length for length in objective.lengths]
    cached = HiddenCache(objective, max_bytes=n_bytes[0] + n_bytes[2])
    want = loss_of(cached, [0, 1, 2]).item()
    assert loss_of(cached, [0, 1, 2]).item() == pytest.approx(want, rel=1e-5)
    assert set(cached.kept) == {0, 2} or cached.left < n_bytes[2]
    assert sum(x.nbytes for x in cached.kept.values()) <= n_bytes[0] + n_bytes[2]
    # heads of another layer: nothing kept for the first ones may serve
    attach_offsets(tiny, [(2, 0)], torch.ones(1, 8))
    for _ in range(2):
        assert loss_of(cached, [0]).item() == pytest.approx(loss_of(objective, [0]).item(), 1e-5)
    assert cached.layer == 2


@pytest.mark.parametrize("kind", [CrossEntropy, Preference])
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_loss_and_gradients_are_those_of_the_whole_batch(tiny, tokenizer, kind, parts):
    """The parts have different numbers of answer tokens: a mean of their means would differ."""
    rows = [0, 1, 2, 3]
    long = "Q: What is the capital of Braviland? A:"
    texts = [(long, " Braviland"), ("Q: Who?", " the the the the"), ("A:", " Who"), (long, " Q Q")]
    texts = texts if kind is CrossEntropy else [(*text, " is") for text in texts]
    whole = kind(tiny, tokenizer, texts)
    apart, found = Accumulated(whole, parts), []
    for each in (whole, apart):
        parameters = attach_offsets(tiny, [(1, 2), (2, 3)], torch.full((2, 8), 0.2))
        loss = each.loss(each.batch(rows))
        (3 * loss).backward()
        found.append([loss.detach(), *(p.grad for p in parameters)])
        assert each.weight(each.batch(rows)) == whole.weight(whole.batch(rows))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert mean_loss(apart, 3) == pytest.approx(mean_loss(whole, 3), rel=1e-5)


def test_an_epoch_of_4_x_2_ends_as_one_of_batches_of_8(tmp_path, small_data, monkeypatch):
    """Validation takes a quarter at once too, and finds the same."""
    sizes, losses, mean_loss = [], [], evaluation.mean_loss

    def seen(held_out, batch_size):
        sizes.append(batch_size)
        losses.append(mean_loss(held_out, batch_size))
        return losses[-1]

    monkeypatch.setattr(evaluation, "mean_loss", seen)
    flags = ["--data", str(small_data), "--dtype", "float32"]
    flags += ["--heads", "random", "--top", "4", "--epochs", "1", "--n-train", "16"]
    offsets = []
    for parts in ("1", "4"):
        train.main([*flags, "--accumulate", parts, "--run", str(tmp_path / parts)])
        offsets.append(load_file(tmp_path / parts / "offsets.safetensors")["offsets"])
    one, other = offsets
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    assert sizes == [64, 16] and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_every_example_is_seen_once_an_epoch_in_a_new_order():
    for by_length in (False, True):
        schedule = Schedule(lr=0.1, epochs=2, batch_size=4)
        first, second = draw_epochs([3, 1, 2, 5, 4, 1, 1, 2, 9, 9], schedule, 0, by_length)
        for epoch in (first, second):
            assert sorted(map(len, epoch)) == [2, 4, 4]  # a smaller batch counts too
            assert sorted(sum(epoch, [])) == list(range(10))
        assert first != second
        assert draw_epochs([3, 1, 2, 5, 4, 1, 1, 2, 9, 9], schedule, 0, by_length)[0] == first
        assert draw_epochs([3, 1, 2, 5, 4, 1, 1, 2, 9, 9], schedule, 1, by_length)[0] != first


@pytest.mark.parametrize(
    "loss, name",
    [
        (lambda x: x * float("nan"), "loss became nan"),
        (lambda x: x * float("inf"), "loss became inf"),
        # a loss of 0 whose slope is infinite, as where float16 overflows on the way back
        (lambda x: (x - 1).sqrt(), "gradient's norm became inf"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(loss, name):
    x, schedule = torch.nn.Parameter(torch.tensor([1.0])), Schedule(0.1, 1)
    with pytest.raises(InputError, match=f"the {name} at step 3 of 4 .*smaller --lr"):
        train_step(make_optimizer([x], schedule), loss(x).sum(), schedule, 2, 4)
    assert x.item() == 1.0
