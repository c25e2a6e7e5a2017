"""The losses by hand, and the batches against the ones the paper's code made."""

import json
import math

import pytest
import torch
from conftest import MINI
from safetensors.torch import load_file

from lofit.errors import InputError
from lofit.losses import (
    IGNORE,
    answer_cross_entropy,
    answer_log_probs,
    check_length,
    collate,
    dpo_loss,
    encode_example,
    l1_norm,
)
from lofit.tokenizer import load_tokenizer


def test_labels_are_answer_and_eos_only():
    tokenizer = load_tokenizer(MINI)
    ids, labels = encode_example(tokenizer, "Q: Who? A:", "Norvia")
    n_prompt = len(tokenizer.encode("Q: Who? A:"))
    assert ids == [*tokenizer.encode("Q: Who? A:Norvia"), 2]
    assert labels == [IGNORE] * n_prompt + ids[n_prompt:]
    assert len(ids) - n_prompt == 2


class ThreeTokens(torch.nn.Module):
    """A "model" whose hidden state is the id itself and whose logits are chosen by hand."""

    model = staticmethod(lambda ids: ids[..., None].float())
    rows = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

    def logits(self, hidden):
        return self.rows[hidden[..., 0].long()]


def test_answer_cross_entropy_by_hand():
    """Row 1 has two labelled tokens, row 2 one: the mean is over the three, not over rows."""
    ids = torch.tensor([[0, 1, 2], [1, 0, 0]])
    labels = torch.tensor([[IGNORE, 1, 2], [IGNORE, 0, IGNORE]])
    by_hand = [
        math.log(1 + math.e + math.e**2) - 1,  # after id 0, want 1
        math.log(math.e**2 + 2) - 0,  # after id 1, want 2
        math.log(math.e**2 + 2) - 2,  # after id 1, want 0
    ]
    loss = answer_cross_entropy(ThreeTokens(), (ids, labels))
    assert loss.item() == pytest.approx(sum(by_hand) / 3)


def test_padding_does_not_change_the_loss(tiny):
    rows = [([1, 5, 6, 7, 2], [IGNORE] * 3 + [7, 2]), ([1, 8, 2], [IGNORE] * 2 + [2])]
    alone = [answer_cross_entropy(tiny, collate([row], "cpu")) for row in rows]
    together = answer_cross_entropy(tiny, collate(rows, "cpu"))
    assert together.item() == pytest.approx((2 * alone[0] + alone[1]).item() / 3, abs=1e-5)


def test_dpo_loss_by_hand():
    policy = torch.tensor([[-3.0, -1.0], [-5.0, -2.0]])  # chosen, rejected of two pairs
    reference = torch.tensor([[-4.0, -1.0], [-5.0, -4.0]])
    by_hand = [math.log(1 + math.exp(-0.5 * margin)) for margin in (1.0, -2.0)]
    assert dpo_loss(policy, reference, 0.5).item() == pytest.approx(sum(by_hand) / 2)


def test_answer_log_probs_sum_over_each_row(tiny):
    rows = [([1, 5, 6, 7, 2], [IGNORE] * 3 + [7, 2]), ([1, 8, 2], [IGNORE] * 2 + [2])]
    found = answer_log_probs(tiny, collate(rows, "cpu"))
    by_mean = [
        answer_cross_entropy(tiny, collate([row], "cpu")) * n
        for row, n in zip(rows, (2, 1), strict=True)
    ]
    assert torch.allclose(found, -torch.stack(by_mean), atol=1e-5)


def test_l1_norm():
    assert l1_norm([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])]).item() == 6


def test_too_long_an_example_is_named():
    check_length([4, 9], 9, "here")
    with pytest.raises(InputError, match="here: example 1 needs 9 positions, the model has 8"):
        check_length([4, 9], 8, "here")


def test_batches_agree_with_the_papers_code(oracle):
    """From raw texts to the very ids and labels; `A:` ends the prompt, as METHOD has it."""
    tokenizer = load_tokenizer(oracle)
    golden = load_file(oracle / "select_heads_sft_noresize.safetensors")
    texts = json.loads((oracle / "select_heads_sft_noresize.json").read_text())["texts"]
    assert len(texts) == 48
    for step in range(6):
        pairs = (text.rpartition("A:") for text in texts[8 * step : 8 * step + 8])
        encoded = [
            encode_example(tokenizer, before + colon, answer.removesuffix("</s>"))
            for before, colon, answer in pairs
        ]
        ids, labels = collate(encoded, "cpu")
        real = golden[f"step{step}.attention_mask"].bool()
        assert torch.equal(labels, golden[f"step{step}.labels"])
        assert ids.shape == real.shape
        assert torch.equal(ids[real], golden[f"step{step}.input_ids"][real])
