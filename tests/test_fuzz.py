"""Damaged input of every kind: it works, or it is one line that a person can read.

Seeded mutations of each file that is read; and each failure that was once found, by name.
"""

import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MINI, REPO, make_run
from lofit.run.artefacts import load_heads, load_offsets, save_heads

import eval as evaluate
import train
from lofit.errors import LONGEST, InputError, one_line
from lofit.files import lock_folder, sweep_partials, write_text
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ModelConfig
from lofit.llm.tokenizer import load_tokenizer
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
    """read() works or raises an InputError of a readable line; True if it worked."""
    try:
        read()
    except InputError as error:
        line = one_line(str(error))
        assert line.strip() and len(line) <= LONGEST and "\n" not in line
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


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 1.5}, {"intermediate_size": ""}, {"rms_norm_eps": []},
        {"num_hidden_layers": [8, 8]}, {"num_hidden_layers": 100_000}, {"bos_token_id": 1e308},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": "A:"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**30}},
        {"eos_token_id": 10**6}, {"eos_token_id": "16"}, {"layer_types": [[1]]},
        {"rms_norm_eps": math.nan}, {"tie_word_embeddings": "no"}, {"head_dim": True},
    ],
)  # fmt: skip
def test_a_config_field_of_a_wrong_type_or_size_is_refused(change):
    raw = json.loads((MINI / "config.json").read_text())
    with pytest.raises(InputError, match="config.json: "):
        ModelConfig.from_hf(raw | change)


@pytest.mark.parametrize("text", [DEEP, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "{", "[]", "NaN"])
def test_json_that_json_loads_chokes_on(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert not holds(lambda: ModelConfig.from_file(path))


def test_heads_and_offsets(tiny_folder, tmp_path):
    draw, run = random.Random(2), tmp_path / "run"
    model = make_run(run, tiny_folder)
    source = {"model": "m", "fingerprint": model.source.fingerprint}
    save_heads(run / "heads.json", [(0, 1), (2, 3)], torch.rand(3, 4), source)
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


def test_weights_and_tokenizers(tiny_folder, tmp_path):
    draw, folder = random.Random(3), tmp_path / "bad"
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        data = (tiny_folder / name).read_bytes()
        for _ in range(20):
            shutil.copytree(tiny_folder, folder)
            (folder / name).write_bytes(damaged(data, draw))
            holds(lambda: load_model(folder))
            holds(lambda: load_tokenizer(folder).encode("Q: a A:"))
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("task", "name", "fold"),
    [(mquake, "MQuAKE/train.jsonl", None), (clutrr, "clutrr/train.json", None),
     (truthfulqa, "truthfulqa/fold_0_train_seed_42.csv", 0)],
)  # fmt: skip
def test_data_of_the_tasks(small_data, task, name, fold):
    draw, path = random.Random(4), small_data / name
    data = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damaged(data, draw))
        holds(lambda: task.read(small_data, "train", 42, fold))
    if path.suffix == ".csv":
        path.write_bytes(data + b'"' + b"x" * 140_000 + b'",a,b,c,d\n')
        with pytest.raises(InputError, match="not valid CSV"):
            task.read(small_data, "train", 42, fold)
        return
    items = json.loads(data) if path.suffix == ".json" else list(map(json.loads, data.splitlines()))
    for _ in range(100):
        changed = mutated(items[:5], draw)
        lines = "\n".join(map(json.dumps, changed))
        path.write_text(json.dumps(changed) if path.suffix == ".json" else lines)
        holds(lambda: task.read(small_data, "train", 42, fold))


LOOPS = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}", "{{ '%s %s' % 1 }}", "{{ 'a' * 10**11 }}", LOOPS,
        pytest.param("{{ 10**(10**9) }}", marks=pytest.mark.slow),
        "{{ 'a'.center(10**11) }}", "{{ '%99999999999d' % 1 }}",
        "{{ messages | map('nope') | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) | list }}",
        "{% set x = ['a'] * 10**10 %}", "{{ none.a.b }}", "{{ messages[0].content.x.y }}",
    ],
)  # fmt: skip
def test_a_template_can_neither_hang_nor_fill_memory(tiny_folder, template):
    (tiny_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="the chat template (fails|is malformed)"):
        load_chat_template(tiny_folder)("hello")


def test_a_bos_token_of_a_wrong_type_is_refused(tiny_folder):
    settings = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": 5}, "chat_template": "{{ bos_token }}|"}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="bos_token is .*expected a text"):
        load_chat_template(tiny_folder)


def test_flags_that_mean_nothing_are_refused(tiny_folder, capsys):
    for flags in (["--lr", "nan"], ["--batch-size", "0"], ["--epochs", "0"], ["--lr", "-1"]):
        with pytest.raises(SystemExit) as ended:
            train.parse_args(flags)
        assert ended.value.code == 2
        assert "expected a" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_on_one_run_folder(tmp_path):
    hold = "import sys; from lofit.files import lock_folder; from pathlib import Path;"
    hold += "lock_folder(Path(sys.argv[1])); print('on', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO,
    )  # fmt: skip
    child.stdout.readline()
    with pytest.raises(InputError, match="another process writes to it"):
        lock_folder(tmp_path)
    child.kill()
    child.communicate()
    lock_folder(tmp_path)  # a killed process holds nothing
    lock_folder(tmp_path)  # and one's own lock is no obstacle


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = (tmp_path / f".heads.json.{pid}.partial" for pid in (child.pid, 1))
    dead.touch()
    alive.touch()
    sweep_partials(tmp_path)
    assert not dead.exists() and alive.exists()


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tiny_folder, small_data, tmp_path, monkeypatch, capsys
):
    from lofit.run.session import Session

    run = tmp_path / "run"
    before = Session._enter

    def entered(self, fold):
        before(self, fold)
        self.log_file = tmp_path  # a folder

    monkeypatch.setattr(Session, "_enter", entered)
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run)]
    train.main([*flags, "--heads", "random", "--epochs", "1"])
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert (run / "offsets.safetensors").exists()


def test_half_a_surrogate_pair_in_an_answer_is_written_as_its_escape(tmp_path):
    write_text(tmp_path / "a.json", json.dumps({"a": "\ud800"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "\ud800"}


def test_scores_that_are_no_grid_are_refused_with_top(tiny_folder, small_data, tmp_path):
    run = tmp_path / "run"
    model = make_run(run, tiny_folder)
    source = {"model": "m", "fingerprint": model.source.fingerprint}
    save_heads(run / "heads.json", [(0, 1)], torch.tensor(0.5), source)
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run)]
    with pytest.raises(InputError, match="'heads' or 'scores'"):
        train.main([*flags, "--top", "2"])
    assert evaluate.parse_args(["--split", "val"]).split == "val"
