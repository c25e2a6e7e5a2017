"""Packed products against plain ones, and nothing left behind."""

import pytest
import torch
from conftest import difference
from torch import nn

from lofit.fast import packed
from lofit.fast.packed import packed_weights
from lofit.llm.checkpoint import load_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)
IDS = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(0))


def is_packed(model: nn.Module) -> bool:
    return any("forward" in m.__dict__ for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("name", ["llama2", "llama3-tied", "biases", "gemma-mha", "gemma3"])
@torch.no_grad()
def test_logits_agree(loud, name):
    model = load_model(loud(name)[1])
    plain = model(IDS)
    with packed_weights(model):
        assert is_packed(model)
        packed_logits = model(IDS)
    assert difference(packed_logits, plain) <= 1e-5 * plain.abs().max()
    assert not is_packed(model)
    assert torch.equal(model(IDS), plain)


@torch.no_grad()
def test_bfloat16_is_no_less_precise(loud):
    folder = loud("gqa")[1]
    exact, model = load_model(folder)(IDS), load_model(folder, dtype=torch.bfloat16)
    error = difference(model(IDS).float(), exact)
    with packed_weights(model):
        assert difference(model(IDS).float(), exact) <= 1.1 * error


@torch.no_grad()
def test_takes_the_bias_of_the_moment(loud):
    model = load_model(loud("gqa")[1])
    o_proj = model.model.layers[1].self_attn.o_proj
    o_proj.bias = nn.Parameter(torch.randn(48), requires_grad=False)
    plain = model(IDS)
    with packed_weights(model):
        assert difference(model(IDS), plain) <= 1e-5 * plain.abs().max()
    o_proj.bias = None
    assert difference(model(IDS), plain) > 0.1


def test_undone_after_an_error(loud):
    model = load_model(loud("llama2")[1])
    with pytest.raises(KeyboardInterrupt), packed_weights(model):
        raise KeyboardInterrupt
    assert not is_packed(model)


def test_no_copy_of_large_weights_nor_of_float16_nor_on_another_device(loud, monkeypatch):
    half = load_model(loud("llama2")[1], dtype=torch.float16)
    with packed_weights(half):
        assert not is_packed(half)
    elsewhere = nn.Linear(2, 2, device="meta")
    with packed_weights(elsewhere):
        assert not is_packed(elsewhere)
    model = load_model(loud("llama2")[1])
    size = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    for limit, applies in ((size, True), (size - 1, False)):
        monkeypatch.setattr(packed, "MAX_BYTES", limit)
        with packed_weights(model):
            assert is_packed(model) is applies
