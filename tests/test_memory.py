"""What the plan computes without values is what real models and steps take."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import MINI, PLAIN_ROPE, REPO, random_model, slow_but

from lofit import errors
from lofit.files import write_json
from lofit.heads import attach_scales
from lofit.inspect import memory
from lofit.llm.batches import collate
from lofit.llm.config import ModelConfig
from lofit.llm.generate import prefill
from lofit.llm.model import KVCache
from lofit.llm.scoring import target_losses
from lofit.llm.tokenizer import load_tokenizer
from lofit.llm.tree import pack
from lofit.tasks import find_tasks
from lofit.training import Schedule, make_optimizer

# hidden size, vocabulary and inner size are primes, which no number of processes divides
CONFIG = ModelConfig(
    vocab_size=997, hidden_size=61, intermediate_size=149, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    rms_norm_eps=1e-5, eos_token_id=(2,), rope_parameters=PLAIN_ROPE,
)  # fmt: skip
KINDS = {"untied": CONFIG, "tied": replace(CONFIG, tie_word_embeddings=True)}


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_a_real_model(kind, n):
    model = random_model(KINDS[kind])
    found = memory.weight_bytes(KINDS[kind], torch.float32, n)
    parameters, layers = list(model.parameters()), list(model.model.layers.parameters())
    whole = sum(p.nbytes for p in parameters)
    # FSDP2 gives the first process the first rows of each layer's tensors; the rest stays whole
    own = whole - sum(p.nbytes for p in layers) + sum(p.chunk(n)[0].nbytes for p in layers)
    block = sum(p.nbytes for p in model.model.layers[1].parameters())
    assert found == {"all": whole, "own": own, "gathered": 2 * block}
    halved = memory.weight_bytes(KINDS[kind], torch.bfloat16, n)
    assert halved == {name: size // 2 for name, size in found.items()}


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


def rows_of(n: int, length: int, new: int) -> list:
    return [[([1] * length, [-100] * (length - new) + [1] * new)]] * n


PAIRS = [[([1] * 30 + [2] * 9, [-100] * 31 + [2] * 8), ([1] * 36, [-100] * 31 + [1] * 5)]] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [rows_of(6, 48, 8), rows_of(1, 3, 1), PAIRS])
def test_a_training_step_is_that_of_real_tensors(kind, rows):
    """Of few tokens, it is for a good part the parameters, their gradients and AdamW's state."""
    config = replace(KINDS[kind], vocab_size=101, num_attention_heads=64)
    model = random_model(config).requires_grad_(False)
    parameters = attach_scales(model, torch.zeros(3, 64, 16))
    optimizer = make_optimizer(parameters, Schedule(lr=0.1, epochs=1))
    batch = pack(rows, "cpu") if rows is PAIRS else collate([text for (text,) in rows], "cpu")
    taken = allocated(lambda: target_losses(model, batch).mean().backward())
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    taken += sum(t.nbytes for t in [*parameters, *states])
    found = memory.training_bytes(config, torch.float32, rows)
    assert found == pytest.approx(taken, rel=0.02)


def test_an_evaluation_is_that_of_real_tensors():
    model, ids = random_model(CONFIG), torch.ones(5, 40, dtype=torch.int64)

    def ask() -> None:
        made.append(KVCache(model, 5, 52))
        prefill(model, ids, torch.full((5,), 40), made[0])

    made = []
    taken = allocated(ask)
    found = memory.evaluation_bytes(CONFIG, torch.float32, rows_of(5, 40, 0), 12)
    assert found == pytest.approx(taken, rel=0.02)
    with torch.no_grad():
        taken = allocated(lambda: target_losses(model, pack(PAIRS, "cpu")))
    found = memory.evaluation_bytes(CONFIG, torch.float32, PAIRS, 0)
    assert found == pytest.approx(taken, rel=0.02)


def printed(capsys, *flags) -> tuple[dict[str, list[str]], list[str]]:
    """The table, and the lines on how to make it fit."""
    memory.main([*map(str, flags)])
    head, _, *lines = capsys.readouterr().out.splitlines()
    table = {line[:28].strip(): line[28:].split() for line in lines[1:] if line[:2] != "  "}
    return {"head": [head]} | table, [line for line in lines if line[:2] == "  "]


@pytest.fixture
def folder(tmp_path):
    """config.json of a model of 1.2 GB in bf16."""
    sizes = {"hidden_size": 1024, "intermediate_size": 24576, "num_hidden_layers": 8}
    write_json(tmp_path / "config.json", replace(CONFIG, **sizes).to_hf())
    return tmp_path


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(folder, capsys):
    flags = ["--model", folder, "--length", 100, "--batch-size", 1, "--memory"]
    found, cures = printed(capsys, *flags, 4)
    assert found["fits 4 GB"] == ["yes"] and not cures
    weights, cuda, *steps = (float(cells[0]) for name, cells in found.items() if "GB" not in name
                             and name not in ("head",))  # fmt: skip
    for used, whole in (steps[:2], steps[2:]):
        assert whole == pytest.approx(weights + cuda + used, abs=2e-3)
    assert cuda == 0.5
    found, cures = printed(capsys, *flags, 2, "--eval-batch", 512)
    (line,) = cures
    n = int(re.fullmatch(r"  to make it fit: eval.py --batch-size (\d+) fits", line)[1])
    assert found["fits 2 GB"] == ["no"] and not printed(capsys, *flags, 2, "--eval-batch", n)[1]
    assert printed(capsys, *flags, 2, "--eval-batch", 2 * n)[1]
    found, cures = printed(capsys, *flags, 1, "--gpus", 8, "--eval-batch", 1)
    assert found["fits 1 GB"] == ["no", "no"]  # 1.2 GB, and 0.15 GB + 2 * 0.15 GB + 0.5 GB
    assert "no batch of train.py fits: more --gpus" in cures[0]


@pytest.mark.parametrize("task", slow_but(["clutrr"], ["clutrr", "mquake", "truthfulqa-0"]))
def test_the_lengths_are_those_of_the_task(task, capsys):
    found, _ = printed(capsys, "--model", MINI, "--task", task)
    tokenizer, (task,) = load_tokenizer(MINI), find_tasks(task)
    train, test = (
        task.read(task.file(REPO / "data" / "mini", split), split, 42)
        for split in ("train", "test")
    )

    def longest(prompt, answers):
        return sum(len(tokenizer.encode(prompt + answer)) + 1 for answer in answers)

    n = max(longest(e.prompt, [e.answer, *filter(None, [e.rejected])]) for e in train)
    asked = max(
        longest(e.question, [*e.right, *e.wrong]) if e.right else len(tokenizer.encode(e.prompt))
        for e in test
    )
    assert f"up to {n} tokens in training, {asked} in evaluation" in found["head"][0]
    assert float(found["kept states (RAM), at most"][0]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "expected a whole number above 0, found '0'"),
        (["--memory", "80GB"], "expected a whole number, found '80GB'"),
        (["--length", "16"], "--length: expected more than the 16 tokens of an answer"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--model", "./nowhere"], "./nowhere: no such folder"),
        (["--model", str(MINI), "--task", "mquake", "--chat"], "no chat template"),
        (["--task", "nowhere"], "--task nowhere: neither one of"),
    ],
)
def test_bad_arguments_end_with_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        errors.run(partial(memory.main, flags))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
