"""Damaged input of every kind: it works, or it is one line that a person can read. Seeded mutations
of each file that is read."""

import json
import math
import random
import shutil

import pytest
import torch
from conftest import MINI, make_run

from lofit.errors import InputError
from lofit.files import hash_of, read_tensors, write_tensors
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ModelConfig
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.files import VERSION, load_heads, load_offsets, save_heads
from lofit.run.tuned import open_tuned, read_results
from lofit.tasks import clutrr, mquake, truthfulqa

DEEP = "[" * 200_000 + "]" * 200_000
NASTY = [
    None, -1, 0, 1.5, "", "A:", "16", [], {}, [8, 8], True, 10**30, 1e308, -(10**9), math.nan,
    math.inf, "x" * 5000, "\ud800", {"content": 5}, [None], [[1]],
]  # fmt: skip


def places(value, at=()):
    """Every path into a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*at, key))


def mutated(value, draw: random.Random):
    """A copy with one place replaced or removed."""
    value = json.loads(json.dumps(value))
    *way, last = draw.choice([at for at in places(value) if at])
    part = value
    for key in way:
        part = part[key]
    if draw.random() < 0.2:
        del part[last]
    else:
        part[last] = draw.choice(NASTY)
    return value


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled, or something put in front."""
    kind, at = draw.randrange(5), draw.randrange(max(1, len(data)))
    junk = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    return [
        data[:at] + junk + data[at + len(junk) :], data[:at], data[:at] + data[at // 2 :],
        b"\xef\xbb\xbf" + data, data[:at] + DEEP.encode() + data[at:],
    ][kind]  # fmt: skip


def holds(read):
    """read() works or raises an InputError, which is one line; True if it worked."""
    try:
        read()
    except InputError as error:
        assert str(error).strip()
        return False
    return True


def test_configs(tmp_path):
    draw, raw = random.Random(1), json.loads((MINI / "config.json").read_text())
    raw |= {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8}
    }
    path, worked = tmp_path / "config.json", 0
    for _ in range(300):
        path.write_text(json.dumps(mutated(raw, draw)))
        worked += holds(lambda: ModelConfig.from_file(path))
    assert 10 < worked < 250
    for _ in range(40):
        path.write_bytes(damaged(json.dumps(raw).encode(), draw))
        holds(lambda: ModelConfig.from_file(path))


@pytest.mark.slow
def test_heads_and_offsets(tiny_folder, tmp_path):
    draw, run = random.Random(2), tmp_path / "run"
    model = make_run(run, tiny_folder)
    info = {"version": VERSION, "model": "m", "fingerprint": model.source.fingerprint}
    save_heads(run / "heads.json", [(0, 1), (2, 3)], torch.rand(3, 4), info)
    heads = json.loads((run / "heads.json").read_text())
    bad, worked = tmp_path / "bad.json", 0
    for _ in range(150):
        bad.write_text(json.dumps(mutated(heads, draw)))
        worked += holds(lambda: load_heads(bad, model))
    assert worked < 140
    whole, bad = (run / "offsets.safetensors").read_bytes(), tmp_path / "bad.safetensors"
    for _ in range(150):
        bad.write_bytes(damaged(whole, draw))
        holds(lambda: load_offsets(bad, model))
    tensors, info = read_tensors(run / "offsets.safetensors")
    for _ in range(100):  # whole files whose header says something else
        write_tensors(bad, tensors, mutated(info, draw))
        holds(lambda: load_offsets(bad, model))
    tuned = open_tuned(run)
    results = info | {"adapters": {"tuned": {"offsets_hash": hash_of(tuned.path)}}}
    results |= {
        "differences": {"tuned": {"em": {"value": 0.2}}},
        "scores": {"base": {"em": 0.5}, "tuned": {"em": 0.7}},
        "n": 20,
    }
    for _ in range(100):
        (run / "results.json").write_text(json.dumps(mutated(results, draw)))
        holds(lambda: read_results(tuned))


@pytest.mark.slow
def test_weights_and_tokenizers(tiny_folder, tmp_path):
    draw, folder = random.Random(3), tmp_path / "bad"
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (tiny_folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    whole = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    for name in ("model.safetensors", "tokenizer.json", *whole):
        data = (tiny_folder / name).read_bytes()
        for _ in range(20):
            shutil.copytree(tiny_folder, folder)
            (folder / name).write_bytes(damaged(data, draw))
            if name == "model.safetensors":
                holds(lambda: load_model(folder))
            holds(lambda: load_tokenizer(folder).encode("Q: a A:"))
            if name in whole:
                holds(lambda: load_chat_template(folder)[0]("Q: a A:"))
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("task", "name"),
    [(mquake.TASK, "MQuAKE/train.jsonl"), (clutrr.TASK, "clutrr/train.json"),
     (truthfulqa.FOLDS[0], "truthfulqa/fold_0_train_seed_42.csv")],
)  # fmt: skip
def test_data_of_the_tasks(small_data, task, name):
    draw, path = random.Random(4), small_data / name
    data = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damaged(data, draw))
        holds(lambda: task.read(path, "train", 42))
    if path.suffix == ".csv":
        return
    items = json.loads(data) if path.suffix == ".json" else list(map(json.loads, data.splitlines()))
    for _ in range(100):
        changed = mutated(items[:5], draw)
        lines = "\n".join(map(json.dumps, changed))
        path.write_text(json.dumps(changed) if path.suffix == ".json" else lines)
        holds(lambda: task.read(path, "train", 42))
