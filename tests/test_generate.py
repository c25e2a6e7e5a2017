"""Greedy decoding with the cache: the same tokens as without it, and as the paper's code."""

import pytest
import torch

from lofit.fast.decoding import compiled_step
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import load_model
from lofit.llm.generate import Decoding, decode_step, generate, generate_all

PROMPTS = [[1, 50, 60, 70, 80, 90], [1, 33], [1, 200, 300, 400]]


def plain(model, prompt, n):
    """Greedy without any cache: the whole text anew for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("edited", [False, True])
def test_cached_and_padded_equals_plain(tiny, edited):
    """Edits act at every position, prompt and new tokens alike."""
    if edited:
        attach_offsets(tiny, [(1, 2), (2, 0)], torch.ones(2, 8))
    want = [plain(tiny, prompt, 8) for prompt in PROMPTS]
    assert generate(tiny, PROMPTS, 8, eos_ids=(-1,)) == want
    assert generate_all(tiny, PROMPTS, 8, (-1,), batch_size=2, description="") == want


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window", "qwen2-window"])
def test_windows_and_caps_with_prompts_of_all_lengths(loud, name):
    """Prompts shorter and longer than the window of 10; the rows decode at different positions."""
    model = load_model(loud(name)[1])
    prompts = [[5 + (7 * i) % 90 for i in range(n)] for n in (6, 25, 14, 9)]
    want = [plain(model, prompt, 8) for prompt in prompts]
    assert generate(model, prompts, 8, eos_ids=(-1,)) == want


def test_each_row_stops_at_any_of_its_eos_ids(tiny):
    whole = generate(tiny, PROMPTS, 8, eos_ids=(-1,))
    eos = (whole[0][3], whole[1][0])
    want = [row[: min([row.index(t) for t in eos if t in row] or [8])] for row in whole]
    assert generate(tiny, PROMPTS, 8, eos) == want
    assert len(want[0]) <= 3 and want[1] == []


def test_a_row_stops_behind_a_stop_token_and_leaves_the_batch(tiny):
    """The others decode on as they would alone."""
    whole = generate(tiny, PROMPTS, 8, eos_ids=(-1,))
    stops = frozenset({whole[0][1], whole[1][0]})
    sizes = []

    def step(model, token, position, cache):
        sizes.append(len(token))
        return decode_step(model, token, position, cache)

    got = generate(tiny, PROMPTS, 8, (-1,), stops, Decoding(step))
    for row, every in zip(got, whole, strict=True):
        n = next((i + 1 for i, t in enumerate(every) if t in stops), 8)
        assert row == every[:n]
    longest = max(map(len, got))
    assert min(map(len, got)) < longest and len(sizes) == longest - 1
    assert sizes[0] > sizes[-1] == 1


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_tokens(tiny):
    attach_offsets(tiny, [(1, 2)], torch.ones(1, 8))
    want = generate(tiny, PROMPTS, 8, eos_ids=(-1,))
    assert generate(tiny, PROMPTS, 8, (-1,), decoding=Decoding(compiled_step())) == want
