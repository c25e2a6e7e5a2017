"""The benchmark measures what it says: sides that share weights and compute the same."""

import pytest
import torch

pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
import benchmark  # noqa: E402
from peers import hf_twin, lora  # noqa: E402


@pytest.fixture(scope="module")
def bench() -> benchmark.Bench:
    args = ["--shape", "tiny", "--epochs", "1"]
    return benchmark.Bench(benchmark.parse_args(args), torch.float32)


def test_all_sides_share_the_weights(bench):
    ours = bench.model.state_dict()
    twin = hf_twin(bench.model)
    adapted, trained = lora(hf_twin(bench.model))
    ids = torch.tensor([[1, 5, 9, 900]])
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, bench.model(ids), rtol=1e-4, atol=1e-5)
    assert not any(t.is_meta for t in [*twin.parameters(), *twin.buffers()])
    assert all(p.data_ptr() == ours[name].data_ptr() for name, p in twin.named_parameters())
    shared = {t.data_ptr() for t in ours.values()}
    mine = {p for p in adapted.parameters() if p.data_ptr() not in shared}
    assert mine == set(trained) and trained


def test_a_side_that_computes_something_else_is_seen(bench, monkeypatch):
    benchmark.check(bench, 1e-4)
    loss = bench.loss
    monkeypatch.setattr(
        bench, "loss", lambda side, texts: loss(side, texts[:7] if side == "hf" else texts)
    )
    with pytest.raises((AssertionError, IndexError)):
        benchmark.check(bench, 1e-4)


def test_texts_hold_ids_of_the_shape(bench):
    texts = [part for pair in [*bench.step, *bench.examples] for part in pair]
    texts += [text for question, answers, _ in bench.asked for text in (question, *answers)]
    vocabulary = bench.model.config.vocab_size
    assert 900 < max(int(i) for text in texts for i in text.split()) < vocabulary
