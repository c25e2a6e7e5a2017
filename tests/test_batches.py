"""Batches: against the paper's code; packed texts against texts in rows of their own."""

import json

import pytest
import torch
from conftest import GOLDEN, MINI, check_batch, difference
from safetensors.torch import load_file

from lofit.errors import InputError
from lofit.llm.batches import IGNORE, collate, draw_batches, encode_example
from lofit.llm.checkpoint import load_model
from lofit.llm.scoring import sum_by_text, target_losses
from lofit.llm.tokenizer import load_tokenizer
from lofit.llm.tree import common_prefix, pack


def test_labels_are_answer_and_eos_only():
    tokenizer = load_tokenizer(MINI)
    ids, labels = encode_example(tokenizer, "Q: Who? A:", "Norvia")
    n_prompt = len(tokenizer.encode("Q: Who? A:"))
    assert ids == [*tokenizer.encode("Q: Who? A:Norvia"), 2]
    assert labels == [IGNORE] * n_prompt + ids[n_prompt:]
    assert len(ids) - n_prompt == 2


@pytest.mark.parametrize("name", ["select_heads", "train_offsets"])
def test_batches_agree_with_the_papers_code(recordings, name):
    """From raw texts to the very ids and labels; `A:` ends the prompt, as METHOD has it."""
    tokenizer = load_tokenizer(recordings)
    golden = load_file(GOLDEN / f"{name}.safetensors")
    texts = json.loads((recordings / f"{name}_sft_noresize.json").read_text())["texts"]
    assert len(texts) == 48
    for step in range(6):
        pairs = (text.rpartition("A:") for text in texts[8 * step : 8 * step + 8])
        encoded = [
            encode_example(tokenizer, before + colon, answer.removesuffix("</s>"))
            for before, colon, answer in pairs
        ]
        check_batch(collate(encoded, "cpu"), golden, step)


def test_pairs_agree_with_the_papers_code(recordings):
    """Theirs: the chosen answers in rows 0 to 3, the rejected ones in 4 to 7."""
    tokenizer = load_tokenizer(recordings)
    golden = load_file(GOLDEN / "train_offsets_dpo.safetensors")
    told = json.loads((recordings / "train_offsets_dpo_refzero_noresize.json").read_text())
    assert len(told["pairs"]) == 12
    for step in range(3):
        pairs = told["pairs"][4 * step : 4 * step + 4]
        encoded = [
            encode_example(tokenizer, pair["prompt"], pair[which])
            for which in ("chosen", "rejected")
            for pair in pairs
        ]
        check_batch(collate(encoded, "cpu"), golden, step)


def test_an_answer_needs_a_token_before_it():
    """Else the model would predict it from the end of the row; Qwen 2 and SmolLM2 have no bos."""
    tokenizer = load_tokenizer(MINI)
    tokenizer.prefix = []
    assert len(encode_example(tokenizer, "Q:", " Norvia")[0]) > 2
    for prompt, answer in (("", "Norvia"), ("Bra", "viland")):
        with pytest.raises(InputError, match=f"'{prompt}' has no token before its answer"):
            encode_example(tokenizer, prompt, answer)


def text(n_prompt, *ids):
    return list(ids), [IGNORE] * n_prompt + list(ids[n_prompt:])


# answers that begin alike (the shared token is labelled in both), one that is the start of another,
# one alone in its row
GROUPS = [
    [text(3, 1, 5, 6, 7, 8, 2), text(3, 1, 5, 6, 7, 9, 11, 12, 2), text(3, 1, 5, 6, 10)],
    [text(2, 1, 5, 4, 4), text(2, 1, 5, 4, 4, 4)],
    [text(2, 1, 5, 9, 9, 2)],
]


def log_probs(model, batch):
    return sum_by_text(target_losses(model, batch), batch)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_packed_texts_score_like_texts_in_rows_of_their_own(tiny, with_prefix):
    want = log_probs(tiny, collate([t for group in GROUPS for t in group], "cpu"))
    prefix = None
    if with_prefix:
        prefix = common_prefix(tiny, [t for group in GROUPS for t in group])
    batch = pack(GROUPS, "cpu", prefix)
    assert batch.ids[0].tolist()[: 7 - with_prefix] == [1, 5, 6, 7, 8, 2, 7][with_prefix:]
    assert difference(log_probs(tiny, batch), want) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window", "yarn"])
def test_packed_texts_under_windows_and_other_positions(loud, name):
    """Texts longer than the window of 10, the shared beginning in the cache too."""
    model = load_model(loud(name)[1])
    start = [5 + (7 * i) % 90 for i in range(9)]
    groups = [
        [text(12, *start, *middle, *rest) for rest in ([9, 8, 7], [3] * 5, [4])]
        for middle in ([20, 21, 22], [30, 31, 32, 33])
    ]
    want = log_probs(model, collate([t for group in groups for t in group], "cpu"))
    prefix = common_prefix(model, [t for group in groups for t in group])
    assert prefix.k.shape[3] == 9
    for packed in (pack(groups, "cpu"), pack(groups, "cpu", prefix)):
        assert difference(log_probs(model, packed), want) < 1e-3  # sums of large losses
        assert torch.allclose(log_probs(model, packed), want, rtol=1e-5)


def test_batches_by_length_hold_little_padding_and_are_not_sorted():
    lengths = [10 + (37 * i) % 50 for i in range(256)]

    def padding(by_length):
        batches = draw_batches(lengths, 8, torch.Generator().manual_seed(0), by_length)
        widths = [max(lengths[i] for i in rows) for rows in batches]
        assert widths != sorted(widths)
        return sum(width * 8 for width in widths) / sum(lengths) - 1

    assert padding(True) < 0.1 < 0.4 < padding(False)
