"""The benchmark measures what it says: rates, sides that share weights, what users get on a GPU."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
import benchmark  # noqa: E402
import benchmark_limits  # noqa: E402
import benchmark_work  # noqa: E402
from benchmark_work import EAGER, Bench  # noqa: E402
from peers import hf_twin, lora  # noqa: E402
from shapes import SHAPES, random_model  # noqa: E402

from lofit.fast.decoding import GraphedDecoding  # noqa: E402


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("tiny", "cpu", torch.float32, "ours", epochs=1)


def test_a_rate_is_measured_over_fifty_milliseconds(monkeypatch):
    """Whatever one piece of work takes, and by the faster of two runs."""
    done = []
    monkeypatch.setattr(benchmark_limits, "seconds", lambda run, device: run() or times.pop(0))
    times = [0.01, 0.2, 0.049, 0.049, 0.06, 0.05]
    run, n = benchmark_limits.lengthened(done.append, 3, "cpu")
    assert n == 12 and not times and done == [3, 3, 3, 6, 6, 12, 12]
    run()
    assert done[-1] == 12


@pytest.mark.parametrize("shape, weights", [("tiny", 32), ("small", 24)])
def test_a_chain_takes_each_weight_once_before_any_again(monkeypatch, shape, weights):
    monkeypatch.setattr(benchmark_limits, "ROWS", 2)
    monkeypatch.setattr(benchmark_limits, "lengthened", lambda work, n, _: (partial(work, n), n))
    config = SimpleNamespace(**SHAPES[shape])
    seen = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: seen.append(self) or forward(self, x)
    )
    bench = SimpleNamespace(config=config, device="cpu")
    with benchmark_limits.matrix_products(bench, torch.float32, packed=False) as (run, flops):
        with FlopCounterMode(display=False) as counter:
            run()
    assert counter.get_total_flops() == flops
    assert len(seen) == len(set(seen)) == weights


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


def test_fp32_layer_by_layer_is_fp32():
    model = random_model(SHAPES["tiny"], torch.bfloat16, "cpu")
    at = {name: p.data_ptr() for name, p in model.named_parameters()}
    ids = torch.tensor([[1, 5, 9, 900]])
    with torch.no_grad():
        want = copy.deepcopy(model).float()(ids)
        with benchmark.layers_in_fp32(model):
            assert torch.equal(model(ids), want)
            held = [p.dtype for p in model.model.layers.parameters()]
            assert set(held) == {torch.bfloat16}  # no layer stays
        assert not torch.equal(model(ids).float(), want)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == at


def test_on_a_gpu_ours_is_what_users_get(bench, monkeypatch):
    """Graph replays, beside the same without; both sides take turns on one model."""
    made = []

    class Padded(benchmark_work.GraphedObjective):  # what CI has of a graph
        def __init__(self, objective):
            super().__init__(objective, capture=False)
            made.append(self)

    monkeypatch.setattr(benchmark_work, "GraphedObjective", Padded)
    monkeypatch.setattr(bench, "graphs", True)
    monkeypatch.setattr(bench, "theirs", lambda *_: ([torch.zeros(1)], None))
    assert [*benchmark.works(bench)["selection step"]()] == ["ours", EAGER, "hf", "lora"]
    ours, eager = bench.selection("ours"), bench.selection(EAGER)
    made.clear()
    losses = [[side() for _ in range(3)] for side in (ours, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]
    found = [bench.training(side, "all")() for side in ("ours", EAGER)]
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(made) == 1
    monkeypatch.setattr(
        benchmark_work, "GraphedDecoding", lambda: made.append(0) or GraphedDecoding(capture=False)
    )
    o_proj = bench.model.model.layers[1].self_attn.o_proj
    with bench.during:
        runs = [bench.greedy(side) for side in ("ours", EAGER)]
        tokens = [[run() for _ in range(2)] for run in runs]
        assert o_proj.bias is not None  # folded once for all batches
    assert tokens[0] == tokens[1] and len(made) == 2 and o_proj.bias is None


def test_a_gpus_peak_is_that_of_one_run_beyond_what_was_there(bench, monkeypatch):
    """In this process; with the memory that torch took for it."""
    state, log = {"allocated": 7, "reserved": 9}, []
    fakes = {
        "empty_cache": lambda: log.append("empty"),
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "memory_allocated": lambda: state["allocated"] << 20,
        "memory_reserved": lambda: state["reserved"] << 20,
        "max_memory_allocated": lambda: state["allocated"] + 5 << 20,
        "max_memory_reserved": lambda: state["reserved"] + 8 << 20,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(benchmark, "one_run", lambda *_: lambda: log.append("run"))
    assert benchmark.gpu_peak(bench, "ours", "step") == {"mib": 5, "taken": 8}
    assert log == ["empty", "reset", "run"]


@pytest.mark.parametrize("device, memory", [("cpu", ("mib",)), ("cuda", ("mib", "taken"))])
def test_a_row_has_the_columns_of_its_head(device, memory):
    columns = benchmark.columns(SimpleNamespace(device=device, no_peaks=False))
    record = {"work": "selection step", "side": EAGER, "rounds": [1.0, 3.0], "seconds": 2.0}
    record |= {"ratio": 1.0, "share": 0.5} | dict.fromkeys(memory, 10.0)
    assert len(benchmark.table_row(record)) == 24 + 12 + 9 * len(columns)


def test_texts_hold_ids_of_the_shape(bench):
    texts = [part for pair in [*bench.step, *bench.examples] for part in pair]
    texts += [text for question, answers in bench.asked for text in (question, *answers)]
    assert 900 < max(int(i) for text in texts for i in text.split()) < bench.config.vocab_size
