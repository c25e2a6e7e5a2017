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
from lofit.llm.save import hf_config
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
    layers = list(model.model.layers.parameters())
    # FSDP2 gives the first process the first rows of each layer's tensors; the rest stays whole
    own = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in layers)
    own += sum(p.chunk(n)[0].nbytes for p in layers)
    block = sum(p.nbytes for p in model.model.layers[1].parameters())
    want = own + (2 * block if n > 1 else 0)
    assert memory.weight_bytes(KINDS[kind], torch.float32, n) == want
    assert memory.weight_bytes(KINDS[kind], torch.bfloat16, n) == want // 2


def test_weights_in_4_bits_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason='needs pip install -e ".[test]"')
    config = replace(CONFIG, hidden_size=512, intermediate_size=1024, head_dim=64)
    model, taken = random_model(config), 0
    for p in model.parameters():
        taken += p.nbytes
    for p in (p for p in model.model.layers.parameters() if p.dim() == 2):
        packed = bnb.nn.Params4bit(p.data, quant_type="nf4", compress_statistics=True).to("cpu")
        state = packed.quant_state
        taken += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes - p.nbytes
    taken += 512 * 1024 * 4  # the largest, unpacked while it is used
    found = memory.weight_bytes(config, torch.float32, nf4=True)
    assert found == pytest.approx(taken, rel=1e-3)


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


def printed(capsys, *flags) -> tuple[str, dict[str, str], list[str]]:
    """The first line, the table, and the lines on how to make it fit."""
    memory.main([*map(str, flags)])
    head, _, _, *lines = capsys.readouterr().out.splitlines()
    table = {line[:28].strip(): line[28:].strip() for line in lines if line[:2] != "  "}
    return head, table, [line.strip() for line in lines if line[:2] == "  "]


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(tmp_path, capsys):
    """Of a model of 1.2 GB in bf16."""
    sizes = {"hidden_size": 1024, "intermediate_size": 24576, "num_hidden_layers": 8}
    config = replace(CONFIG, **sizes)
    write_json(tmp_path / "config.json", hf_config(config))
    flags = ["--model", tmp_path, "--length", 100, "--batch-size", 16, "--memory"]
    _, found, cures = printed(capsys, *flags, 4)
    assert found["fits 4 GB"] == "yes" and not cures
    weights, cuda, *steps = map(float, list(found.values())[:-1])
    for used, whole in (steps[:2], steps[2:]):
        assert whole == pytest.approx(weights + cuda + used, abs=2e-3)
    assert cuda == 0.5
    _, found, (trained, evaluated) = printed(capsys, *flags, 2)
    assert found["fits 2 GB"] == "no"
    parts = int(re.fullmatch(r"train.py --accumulate (\d+) fits", trained)[1])
    told = re.fullmatch(
        r"eval.py --batch-size (\d+) fits, in train.py --accumulate (\d+)", evaluated
    )
    n = int(told[1])
    assert n * int(told[2]) == 64
    room = 2e9 - memory.weight_bytes(config, torch.bfloat16) - 0.5e9
    for at_once, fits in ((16 // parts, True), (32 // parts, False)):
        rows = rows_of(at_once, 100, 16)
        assert (memory.training_bytes(config, torch.bfloat16, rows) <= room) is fits
    for at_once, fits in ((n, True), (2 * n, False)):
        rows = rows_of(at_once, 84, 0)
        assert (memory.evaluation_bytes(config, torch.bfloat16, rows, 16) <= room) is fits
    _, found, cures = printed(capsys, *flags, 1, "--gpus", 8, "--shard")
    assert found["fits 1 GB"] == "no"  # 0.15 GB + 2 * 0.15 GB + 0.5 GB, and a step
    _, found, cures = printed(capsys, *flags, 1)
    assert cures[0] == "no training fits: --quantize nf4, or --shard and --gpus"
    _, found, _ = printed(capsys, *flags, 1, "--quantize", "nf4")
    assert float(found["weights"]) < 0.4 * weights


@pytest.mark.parametrize("task", slow_but(["clutrr"], ["clutrr", "mquake", "truthfulqa-0"]))
def test_the_lengths_are_those_of_the_task(task, capsys):
    head, found, _ = printed(capsys, "--model", MINI, "--task", task)
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
    assert f"up to {n} tokens in training, {asked} in evaluation" in head
    assert float(found["kept states (RAM), at most"]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "80GB"], "expected a whole number above 0, found '80GB'"),
        (["--length", "16"], "--length: expected more than the 16 tokens of an answer"),
        (["--shard", "--quantize", "nf4"], "not allowed with argument --shard"),
        (["--model", "./nowhere"], "./nowhere: no such folder"),
        (["--model", str(MINI), "--task", "mquake", "--chat"], "no chat template"),
    ],
)
def test_bad_arguments_end_with_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        errors.run(partial(memory.main, flags))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
