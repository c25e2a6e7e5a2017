"""What the plan computes without values is what real models and steps take."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import random_model
from lofit.llm.context import KVCache

from lofit import errors
from lofit.files import write_json
from lofit.heads import attach_scales, init_scales
from lofit.inspect import memory as plan
from lofit.llm.batches import collate
from lofit.llm.config import ModelConfig
from lofit.llm.generate import prefill
from lofit.llm.scoring import target_losses
from lofit.training import optimizer_for

# hidden size, vocabulary and inner size are primes, which no number of processes divides
CONFIG = ModelConfig(
    vocab_size=997, hidden_size=61, intermediate_size=149, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    rms_norm_eps=1e-5, eos_token_id=(2,),
)  # fmt: skip
KINDS = {
    "untied": CONFIG,
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "large layers": replace(CONFIG, vocab_size=101),
    "large layers, tied": replace(CONFIG, vocab_size=101, tie_word_embeddings=True),
}


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_a_real_model(kind, n):
    model = random_model(KINDS[kind])
    found = plan.weight_bytes(KINDS[kind], torch.float32, n)
    parameters = list(model.parameters())
    assert found["all"] == sum(p.nbytes for p in parameters)
    # FSDP2 gives the first process the first of these
    assert found["own"] == sum(p.chunk(n)[0].nbytes for p in parameters)
    halved = plan.weight_bytes(KINDS[kind], torch.bfloat16, n)
    assert halved == {name: size // 2 for name, size in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_gathered_is_the_largest_part_twice(kind):
    """A tied embedding stands beside a layer."""
    model = random_model(KINDS[kind])
    layer = sum(p.nbytes for p in model.model.layers[1].parameters())
    ends = 4 * (KINDS[kind].vocab_size + 1) * 61
    assert (layer > ends) == kind.startswith("large")
    most = {"untied": 2 * ends, "tied": max(2 * ends, 2 * layer + ends), "large layers": 2 * layer}
    expected = most.get(kind, 2 * layer + ends)
    assert plan.weight_bytes(KINDS[kind], torch.float32, 3)["gathered"] == expected


def allocated(call) -> int:
    """Bytes that the C++ side held at the most during a call, by the allocator's own record."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize(("batch", "length", "new"), [(6, 48, 8), (1, 3, 1)])
def test_a_training_step_is_that_of_real_tensors(kind, batch, length, new):
    """Of few tokens, it is for a good part the parameters, their gradients and AdamW's state."""
    config = replace(KINDS[kind], vocab_size=101, num_attention_heads=64)
    model = random_model(config).requires_grad_(False)
    parameters = attach_scales(model, init_scales(model, 0))
    optimizer = optimizer_for(parameters, 0.1)
    texts = collate([([1] * length, [-100] * (length - new) + [1] * new)] * batch, "cpu")
    taken = allocated(lambda: target_losses(model, texts).mean().backward())
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    taken += sum(t.nbytes for t in [*parameters, *states])
    found = plan.training_bytes(config, torch.float32, batch, length, new)
    assert found == pytest.approx(taken, rel=0.02)


def test_an_evaluation_is_that_of_real_tensors():
    model, ids = random_model(CONFIG), torch.ones(5, 40, dtype=torch.int64)

    def ask() -> None:
        made.append(KVCache(CONFIG, 5, 52, model.lm_head.weight))
        prefill(model, ids, torch.full((5,), 40), made[0])

    made = []
    taken = allocated(ask)
    cache, most = plan.evaluation_bytes(CONFIG, torch.float32, 5, 40, 12)
    assert cache == made[0].k.nbytes + made[0].v.nbytes
    assert most == pytest.approx(taken, rel=0.02)


@pytest.fixture
def folder(tmp_path):
    """config.json of a model of 1.2 GB in bf16, of which a process of 8 keeps and gathers 0.5."""
    config = replace(
        CONFIG, vocab_size=997, hidden_size=1024, intermediate_size=24576, num_hidden_layers=8
    )
    write_json(tmp_path / "config.json", config.to_hf())
    return tmp_path


def printed(capsys, *flags) -> dict[str, list[str]]:
    plan.main([*map(str, flags)])
    lines = capsys.readouterr().out.splitlines()[3:]
    return {line[:22].strip(): line[22:].split() for line in lines}


@pytest.mark.slow
def test_the_memory_decides_what_fits(folder, capsys):
    flags = ["--model", folder, "--eval-batch", 1, "--gpus", 8, "--memory"]
    found = printed(capsys, *flags, 1)
    assert found["fits 1 GB"] == ["no", "yes"]
    for what in ("training", "evaluation"):
        whole, split = map(float, found[f"all in {what}"])
        assert split < 1 < whole < 2
    assert printed(capsys, *flags, 2)["fits 2 GB"] == ["yes", "yes"]
    flags[3] = 64  # evaluation alone is too large now
    assert printed(capsys, *flags, 1)["fits 1 GB"] == ["no", "no"]


def test_a_sum_is_of_its_parts(folder, capsys):
    found = printed(capsys, "--model", folder, "--gpus", 8, "--examples", 500, "--length", 100)
    *parts, (fits, _) = found.items()
    assert fits == "fits 80 GB"
    for cells in zip(*(map(float, cells) for _, cells in parts), strict=True):
        weights, gathered, step, cache, active, training, evaluation, kept = cells
        assert training == pytest.approx(weights + gathered + step, abs=2e-3)
        assert evaluation == pytest.approx(weights + gathered + cache + active, abs=2e-3)
        assert kept == pytest.approx(500 * 100 * 1024 * 2 / 1e9, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "expected an integer from 1 to 2147483647, found '0'"),
        (["--memory", "80GB"], "expected an integer from 1 to 2147483647, found '80GB'"),
        (["--length", "16"], "--new: an answer is shorter than its text (--length)"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--model", "./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_bad_arguments_end_with_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        errors.run(partial(plan.main, flags))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
