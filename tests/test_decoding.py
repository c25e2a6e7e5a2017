"""Decoding as a CUDA graph: the padded way against the plain one; captures where there is a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU, REPO, SEES_GPU

from lofit.fast.decoding import LENGTH, ROWS, GraphedDecoding, StaticCache
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import load_model
from lofit.llm.generate import generate, generate_all

PROMPTS = [[5 + (7 * i + n) % 90 for i in range(n)] for n in (6, 9, 14, 11, 25)]


@pytest.mark.parametrize("family", ["gqa", "gemma2", "gemma3", "mistral-window"])
def test_the_padded_way_gives_the_same_tokens(loud, family):
    """Rows and length rounded up, windows narrower than the cache, rows that leave."""
    model = load_model(loud(family)[1])
    attach_offsets(model, [(1, 2)], torch.ones(1, model.config.head_dim))
    want = generate(model, PROMPTS, 12, (-1,))
    stops = frozenset({want[0][1], want[2][2], want[4][0]})
    decoding = GraphedDecoding(capture=False)
    assert generate(model, PROMPTS, 12, (-1,), decoding=decoding) == want
    assert tuple(decoding.cache.k.shape[i] for i in (1, 3)) == (ROWS, LENGTH)
    stopped = generate(model, PROMPTS, 12, (-1,), stops)
    assert stopped != want
    assert generate(model, PROMPTS, 12, (-1,), stops, decoding) == stopped


def test_a_cache_is_kept_for_what_fits_and_what_it_held_is_not_seen(tiny):
    decoding = GraphedDecoding(capture=False)
    generate(tiny, PROMPTS, 8, (-1,), decoding=decoding)
    first = decoding.cache
    first.k.fill_(1e4), first.v.fill_(-1e4)
    new = generate(tiny, PROMPTS[:2], 8, (-1,), decoding=decoding)
    assert decoding.cache is first and new == generate(tiny, PROMPTS[:2], 8, (-1,))
    longer = [[7] * (LENGTH - 4)]
    assert generate(tiny, longer, 8, (-1,), decoding=decoding) == generate(tiny, longer, 8, (-1,))
    assert decoding.cache.k.shape[1] == 1 and decoding.cache.k.shape[3] == 2 * LENGTH
    want = generate_all(tiny, PROMPTS, 8, (-1,), 2, "")
    assert generate_all(tiny, PROMPTS, 8, (-1,), 2, "", decoding=decoding) == want


def test_rows_move_to_the_front_of_a_cache_that_stays(tiny):
    cache = StaticCache(tiny, 4, 3)
    cache.k.copy_(torch.arange(4.0)[None, :, None, None, None].expand_as(cache.k))
    place = cache.k.data_ptr()
    cache.keep_rows([1, 3])
    assert cache.k.data_ptr() == place and cache.k.shape[1] == 4
    assert [cache.k[0, row, 0, 0, 0].item() for row in (0, 1)] == [1, 3]


def test_where_a_capture_fails_decoding_is_eager(tiny, monkeypatch, capsys):
    decoding = GraphedDecoding()

    def fails(*_):
        decoding.graph = "half made"
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decoding, "_capture", fails)
    assert generate(tiny, PROMPTS, 8, (-1,), decoding=decoding) == generate(tiny, PROMPTS, 8, (-1,))
    assert capsys.readouterr().err == (
        "no CUDA graph, decoding runs eagerly: operation not permitted when stream is capturing\n"
    )


def replays_on_a_gpu(folder: str) -> None:
    """Run by the next test in a process that sees the GPU."""
    model = load_model(folder, device="cuda")
    for heads in ([(1, 2)], [(0, 1), (2, 0)]):
        attach_offsets(model, heads, torch.ones(len(heads), 8))
        decoding = GraphedDecoding()
        for prompts in (PROMPTS, PROMPTS[:3], [[7] * (LENGTH - 4)]):
            want = generate(model, prompts, 12, (-1,))
            stops = frozenset({want[0][3]})
            assert generate(model, prompts, 12, (-1,), decoding=decoding) == want
            stopped = generate(model, prompts, 12, (-1,), stops)
            assert generate(model, prompts, 12, (-1,), stops, decoding) == stopped
            assert decoding.capture and decoding.graph is not None


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_replays_give_the_tokens_of_eager(tiny_folder):
    """In a process of its own, for this one sees no GPU."""
    call = f"import test_decoding; test_decoding.replays_on_a_gpu({str(tiny_folder)!r})"
    env = SEES_GPU | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    subprocess.run([sys.executable, "-c", call], env=env, check=True, timeout=300)
