"""Offsets on stock transformers models."""

import pytest
import torch
from conftest import difference, make_run

from lofit.errors import InputError
from lofit.export.live import add_offsets

IDS = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama2", "gqa", "gemma3", "qwen3"])
@torch.no_grad()
def test_a_live_model_is_the_tuned_model_until_the_hooks_go(loud, tmp_path, name):
    theirs, folder = loud(name)
    ours, base = make_run(tmp_path / "run", folder), theirs(IDS).logits
    hooks = add_offsets(theirs, tmp_path / "run")
    assert difference(theirs(IDS).logits, ours(IDS)) < 1e-4
    assert difference(theirs(IDS).logits, base) > 0.1, "the offsets do nothing: no test"
    for hook in hooks:
        hook.remove()
    assert difference(theirs(IDS).logits, base) == 0


def test_offsets_of_another_model_are_refused(loud, tmp_path):
    make_run(tmp_path / "run", loud("gemma3")[1], n=20)
    with pytest.raises(InputError, match="other heads; .* instead of this LlamaForCausalLM"):
        add_offsets(loud("llama2")[0], tmp_path / "run")
