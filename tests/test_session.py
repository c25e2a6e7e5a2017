"""What the scripts share: the folder of a run and its lock, TruthfulQA's two folds, and what is
checked before work begins."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from filelock import FileLock, Timeout
from safetensors.torch import load_file

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.llm.checkpoint import load_model
from lofit.llm.save import save_model

FAST = ["--epochs", "1", "--lr", "0.05"]


@pytest.fixture
def flags(flags, tmp_path):
    return [*flags, "--run", str(tmp_path / "run")]


def test_truthfulqa_is_two_tasks_of_one_model(flags, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "lofit.run.setup.load_model", lambda *a: opened.append(a) or load_model(a[0])
    )
    run, both = tmp_path / "run", [*flags, "--task", "truthfulqa"]
    select_heads.main([*both, *FAST, "--heads", "3"])
    train.main([*both, *FAST])
    eval_script.main(both)
    assert len(opened) == 3
    heads, results, n = [], [], 0
    for name in ("truthfulqa-0", "truthfulqa-1"):
        heads.append(json.loads((run / name / "heads.json").read_text()))
        results.append(json.loads((run / name / "results.json").read_text()))
        offsets = load_file(run / name / "offsets.safetensors")
        assert sorted(offsets["heads"].tolist()) == sorted(heads[-1]["heads"])  # by layer
        assert sorted(results[-1]["adapters"]["tuned"]["heads"]) == sorted(heads[-1]["heads"])
        assert heads[-1]["task"] == results[-1]["task"] == name
        n += results[-1]["n"]
    assert heads[0]["scores"] != heads[1]["scores"]  # each learnt from its own questions
    assert n == 16 and "both folds, 16 items" in capsys.readouterr().out

    # one alone leaves the other as it is; and neither is scored on what it was trained on
    before = (run / "truthfulqa-0" / "offsets.safetensors").read_bytes()
    one = [*flags[:-1], str(run / "truthfulqa-1"), "--task", "truthfulqa-1"]
    train.main([*one, *FAST, "--seed", "7"])
    assert (run / "truthfulqa-0" / "offsets.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="truthfulqa-0 trains on questions that truthfulqa-1 test"):
        eval_script.main([*one, "--offsets", str(run / "truthfulqa-0")])


def is_held(run) -> bool:
    """Whether somebody else is kept from a run's folder."""
    try:
        with FileLock(run / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True


def test_a_notebook_lets_go_of_the_folder(flags, tmp_path, monkeypatch):
    """The process lives on after main(), whole or not; while it runs nobody else may write."""
    held = []
    save_edits = train.save_edits
    monkeypatch.setattr(
        train, "save_edits", lambda *a: (held.append(is_held(tmp_path / "run")), save_edits(*a))
    )
    train.main([*flags, "--heads", "all", "--epochs", "1"])
    assert held == [True] and not is_held(tmp_path / "run")
    error = None
    for stop in (KeyboardInterrupt, ZeroDivisionError):

        def stopped(*_, stop=stop):
            raise stop

        monkeypatch.setattr(train, "save_edits", stopped)
        try:
            train.main([*flags, "--heads", "all", "--epochs", "1"])
        except stop as raised:
            error = raised  # a notebook keeps the last traceback, and with it every frame
        assert error is not None and not is_held(tmp_path / "run")
    with pytest.raises(InputError, match="no such file"):
        eval_script.main([*flags, "--offsets", str(tmp_path)])
    assert not is_held(tmp_path / "run")


def test_a_text_for_which_there_is_no_room_is_named_before_anything_is_trained(
    flags, small_data, tiny_config, tmp_path, capsys
):
    """Also the prompts that are only asked after the training, with room for the answer."""
    folder = flags[1]
    config = replace(tiny_config, max_position_embeddings=256)
    save_model(random_model(config), tmp_path / "tiny", torch.float32)
    for split in ("val", "test"):
        path = small_data / "MQuAKE" / f"{split}.jsonl"
        before = path.read_text()
        lines = before.splitlines()
        case = json.loads(lines[2])
        case["questions"][0] = "the " * (256 - 28)
        path.write_text("\n".join([*lines[:2], json.dumps(case), *lines[3:]]))
        with pytest.raises(InputError, match=f"{split}.jsonl, line 3: 2.. tokens, more than"):
            train.main([*flags, "--heads", "all", "--epochs", "1"])
        assert "epoch 1" not in capsys.readouterr().out
        with pytest.raises(InputError, match=f"{split}.jsonl, line 3: 2.. tokens, more than"):
            eval_script.main([*flags, "--split", split, "--base-only"])
        path.write_text(before)
    (small_data / "MQuAKE" / "test.jsonl").unlink()  # who has no test split yet can train
    train.main([*flags, "--heads", "all", "--epochs", "1", "--model", folder])


def test_what_is_learned_is_kept_of_the_epoch_that_is_asked_for(
    flags, tmp_path, capsys, monkeypatch
):
    """The last epoch, as the paper; or the best, which train.py names either way."""
    means = iter([0.25, 0.75, 0.5] * 2)
    monkeypatch.setattr(
        train, "validate",
        lambda *_: {"loss": 1.0, **dict.fromkeys(("em_stripped", "em"), next(means))},
    )  # fmt: skip
    saved = {}
    for keep in ("last", "best"):
        own = [*flags[:-1], str(tmp_path / keep)]
        train.main([*own, "--heads", "all", "--epochs", "3", "--lr", "0.1", "--keep", keep])
        kept = {"last": 3, "best": 2}[keep]
        said = f"epoch 2 was the best on validation (75.0%); kept: epoch {kept}"
        assert said in capsys.readouterr().out
        saved[keep] = load_file(tmp_path / keep / "offsets.safetensors")["offsets"]
    assert not torch.equal(saved["last"], saved["best"])
    # of two epochs instead of three, at the learning rates of the first two of three
    log = [json.loads(line) for line in (tmp_path / "best" / "log.jsonl").open()]
    assert [r["val"]["em"] for r in log if "val" in r] == [0.25, 0.75, 0.5]
