"""What the scripts share: folds, and each task the whole way through."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import MINI, SHARED, random_model
from safetensors.torch import load_file

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.llm.checkpoint import save_model

FAST = ["--epochs", "2", "--lr", "0.05"]


@pytest.fixture
def mini_flags(tiny_config, small_data, tmp_path):
    """Flags for a tiny model with positions enough for TruthfulQA's prefix."""
    config = replace(tiny_config, max_position_embeddings=512)
    save_model(random_model(config), tmp_path / "long", torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, tmp_path / "long" / name)
    folders = ["--model", str(tmp_path / "long"), "--data", str(small_data)]
    return [*folders, "--run", str(tmp_path / "run")]


def test_both_folds_of_truthfulqa_stay_apart(mini_flags, tmp_path, capsys):
    run, flags = tmp_path / "run", [*mini_flags, "--task", "truthfulqa"]
    select_heads.main([*flags, *FAST, "--heads", "3"])
    train.main([*flags, *FAST])
    eval_script.main(flags)
    heads, results = [], []
    for fold in (0, 1):
        heads.append(json.loads((run / f"fold{fold}" / "heads.json").read_text()))
        results.append(json.loads((run / f"fold{fold}" / "results.json").read_text()))
        offsets = load_file(run / f"fold{fold}" / "offsets.safetensors")
        assert offsets["heads"].tolist() == heads[fold]["heads"] == results[fold]["heads"]
        assert heads[fold]["fold"] == results[fold]["fold"] == fold
    assert heads[0]["scores"] != heads[1]["scores"]  # each learnt from its own questions
    whole = json.loads((run / "results.json").read_text())
    assert whole["n"] == sum(r["n"] for r in results) == 16
    for who in ("base", "tuned"):
        for metric in ("mc1", "mc2", "mc3"):
            assert whole[who][metric] == pytest.approx(sum(r[who][metric] for r in results) / 2)
    assert "both folds, 16 items" in capsys.readouterr().out

    before = (run / "fold0" / "offsets.safetensors").read_bytes()
    train.main([*flags, *FAST, "--fold", "1", "--seed", "7"])
    assert (run / "fold0" / "offsets.safetensors").read_bytes() == before
    shutil.copy(run / "fold0" / "offsets.safetensors", run / "fold1" / "offsets.safetensors")
    with pytest.raises(InputError, match="made for fold 0, but this run is for fold 1"):
        eval_script.main([*flags, "--fold", "1"])


@pytest.mark.slow
def test_heads_of_another_run_are_taken_fold_by_fold(mini_flags, tmp_path):
    flags = [*mini_flags, "--task", "truthfulqa"]
    select_heads.main([*flags, *FAST, "--heads", "3"])
    other = [*flags[:4], "--task", "truthfulqa", "--run", str(tmp_path / "other")]
    train.main([*other, *FAST, "--heads", str(tmp_path / "run"), "--top", "2"])
    for fold in ("fold0", "fold1"):
        heads = json.loads((tmp_path / "run" / fold / "heads.json").read_text())["heads"]
        offsets = load_file(tmp_path / "other" / fold / "offsets.safetensors")
        assert offsets["heads"].tolist() == heads[:2]


@pytest.mark.slow
def test_clutrr_the_whole_way_through(mini_flags, tmp_path):
    flags = [*mini_flags, "--task", "clutrr"]
    select_heads.main([*flags, *FAST, "--heads", "3"])
    train.main([*flags, *FAST])
    eval_script.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["n"] == 10 and list(results["base"]) == ["em"] and results["fold"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("task", "n"), [("mquake", 95), ("clutrr", 450), ("truthfulqa", 164)])
def test_the_papers_own_files_run(recordings, tmp_path, task, n):
    if not (SHARED / "datasets" / "MQuAKE").is_dir():
        pytest.skip("the paper's splits are not on this machine")
    flags = ["--model", str(recordings), "--data", str(SHARED / "datasets"), "--run", str(tmp_path)]
    flags += ["--task", task]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_heads.main([*flags, "--epochs", "1", "--heads", "10%"])
        train.main([*flags, "--epochs", "1"])
        eval_script.main([*flags, "--split", "val"])
    assert json.loads((tmp_path / "results-val.json").read_text())["n"] == n
