"""Files that belong together: what each script refuses to combine, and whose results it shows."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MINI
from safetensors.torch import load_file, save_file

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.files import read_jsonl
from lofit.llm.checkpoint import load_model

FAST = ["--epochs", "1", "--lr", "0.05"]


@pytest.fixture
def flags(tiny_folder, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--model", str(tiny_folder), "--data", str(small_data)]


def read(*parts):
    return json.loads(Path(*parts).read_text())


def own_task(folder, answer=" Ann"):
    folder.mkdir(parents=True)
    line = json.dumps({"prompt": "Q: Who is Simon? A:", "answer": answer})
    for split in ("train", "val", "test"):
        (folder / f"{split}.jsonl").write_text(f"{line}\n{line}\n")
    return str(folder)


def test_train_prints_the_command_that_evaluates_what_it_trained(flags, tmp_path, capsys):
    train.main([*flags, *FAST, "--heads", "random", "--dtype", "float32", "--plain"])
    command = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("to evaluate it: ")
    words = shlex.split(command)
    assert words[:2] == ["python", "eval.py"]
    eval_script.main(words[2:])
    results = read("runs/tiny/mquake-random/results.json")
    assert results["settings"]["heads"] == "random" and results["plain"]


def test_eval_takes_what_was_trained_last_and_says_so(flags, capsys):
    train.main([*flags, *FAST, "--heads", "all"])
    train.main([*flags, "--method", "lora", *FAST])
    eval_script.main(flags)
    out = capsys.readouterr().out
    assert "evaluating runs/tiny/mquake-lora, trained last; --run chooses another" in out
    assert read("runs/tiny/mquake-lora/results.json")["method"] == "lora"
    assert not os.path.exists("runs/tiny/mquake-all/results.json")
    eval_script.main([*flags, "--run", "runs/tiny/mquake-all"])
    assert "method" not in read("runs/tiny/mquake-all/results.json")


def test_results_of_other_splits_and_of_the_base_alone_replace_nothing(flags):
    train.main([*flags, *FAST, "--heads", "random"])
    eval_script.main(flags)
    before = open("runs/tiny/mquake-random/results.json").read()
    run = ["--run", "runs/tiny/mquake-random"]
    for extra in (["--split", "val"], ["--base-only"], ["--split", "val", "--base-only"]):
        eval_script.main([*flags, *run, *extra])
    assert open("runs/tiny/mquake-random/results.json").read() == before
    names = ("results-val.json", "results-base.json", "results-val-base.json")
    found = [read("runs/tiny/mquake-random", name) for name in names]
    assert [f["split"] for f in found] == ["val", "test", "val"]
    assert ["tuned" in f for f in found] == [True, False, False]


def test_heads_chosen_again_make_old_offsets_unusable(flags):
    select_heads.main([*flags, *FAST, "--heads", "2"])
    train.main([*flags, *FAST])
    select_heads.main([*flags, *FAST, "--heads", "2"])  # the same heads: the same file
    eval_script.main(flags)
    select_heads.main([*flags, *FAST, "--heads", "3"])
    with pytest.raises(InputError, match="for other heads; run train.py again, or evaluate these"):
        eval_script.main(flags)
    eval_script.main([*flags, "--offsets", "runs/tiny/mquake"])
    train.main([*flags, *FAST])
    eval_script.main(flags)


def test_two_data_folders_of_one_name_are_not_combined(flags, tmp_path):
    one, two = own_task(tmp_path / "a" / "mine"), own_task(tmp_path / "b" / "mine", " Bob")
    model = flags[:2]
    select_heads.main([*model, "--task", one, *FAST, "--heads", "2"])
    with pytest.raises(InputError, match="heads.json: made for .*a/mine, but .*b/mine; run select"):
        train.main([*model, "--task", two, *FAST])
    train.main([*model, "--task", one, *FAST])
    with pytest.raises(InputError, match="offsets.safetensors: made for .*; run train.py again"):
        eval_script.main([*model, "--task", two])
    path = tmp_path / "a" / "mine" / "train.jsonl"
    path.write_text(path.read_text().replace("Ann", "Joe"))
    with pytest.raises(InputError, match="is for .*a/mine as it is now; run train.py again"):
        eval_script.main([*model, "--task", one])


def test_both_folds_open_one_model_and_the_joint_results_name_both_offsets(
    flags, tiny_folder, monkeypatch
):
    config = read(tiny_folder, "config.json") | {"max_position_embeddings": 512}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    opened = []
    monkeypatch.setattr(
        "lofit.run.session.load_tuned", lambda *a: opened.append(a) or load_model(a[0])
    )
    task = ["--task", "truthfulqa"]
    select_heads.main([*flags, *task, *FAST, "--heads", "2"])
    assert len(opened) == 1
    train.main([*flags, *task, *FAST])
    eval_script.main([*flags, *task])
    assert len(opened) == 3
    whole = read("runs/tiny/truthfulqa/results.json")
    parts = [read("runs/tiny/truthfulqa", f"fold{fold}", "results.json") for fold in (0, 1)]
    assert whole["offsets_hash"] == [part["offsets_hash"] for part in parts]
    assert whole["offsets_hash"][0] != whole["offsets_hash"][1]


def test_offsets_of_another_dtype_are_evaluated_with_a_warning(flags, capsys):
    train.main([*flags, *FAST, "--heads", "random", "--dtype", "float32"])
    eval_script.main([*flags, "--dtype", "bfloat16"])
    err = capsys.readouterr().err
    assert re.search(
        r"trained on a float32 model, evaluated on a bfloat16 one; --dtype float32", err
    )
    eval_script.main([*flags, "--dtype", "float32"])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("task", ["mquake", "truthfulqa"])
def test_outputs_that_are_not_finite_end_an_evaluation(flags, tiny_folder, task):
    path = tiny_folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"].mul_(1e30)
    weights["model.layers.0.mlp.up_proj.weight"].mul_(1e30)
    save_file(weights, path, {"format": "pt"})
    config = read(tiny_folder, "config.json") | {"max_position_embeddings": 512}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the model's outputs are not finite"):
        eval_script.main([*flags, "--task", task, "--base-only"])
    assert not os.path.exists(f"runs/tiny/{task}/results-base.json")


def test_scores_that_are_not_finite_are_not_written(tmp_path):
    from lofit.run.artefacts import save_heads

    scores = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(InputError, match="a head's score is not finite"):
        save_heads(tmp_path / "heads.json", [(0, 0)], scores, {})
    assert not list(tmp_path.iterdir())


def test_a_long_reference_can_be_met_and_long_texts_trained_on(flags, tmp_path, monkeypatch):
    """Limits follow the model for own data, not the paper's 32 new tokens and 400 of an example."""
    task, model = own_task(tmp_path / "long", " the" * 60), flags[:2]
    asked = []
    monkeypatch.setattr(
        "lofit.run.evaluation.generate_all",
        lambda model, prompts, n, *rest: asked.append(n) or [[] for _ in prompts],
    )
    eval_script.main([*model, "--task", task, "--base-only"])
    eval_script.main([*model, "--task", task, "--base-only", "--max-new-tokens", "5", "--fresh"])
    assert asked[0] > 60 and asked[1] == 5
    config = read(flags[1], "config.json") | {"max_position_embeddings": 1024}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    longer = own_task(tmp_path / "longer", " the" * 500)
    select_heads.main([*model, "--task", longer, *FAST, "--heads", "2"])
    with pytest.raises(InputError, match="tokens; the limit of 100 is .*--max-length"):
        select_heads.main([*model, "--task", longer, *FAST, "--max-length", "100"])


def test_texts_that_the_tokenizer_cannot_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = own_task(tmp_path / "foreign", " Wasserfall Straßenbahn Eichhörnchen Zwiebel")
    with pytest.raises(InputError, match="of the tokens are unknown to this model's tokenizer"):
        train.main(["--model", str(MINI), "--task", task, "--heads", "all", *FAST])


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode() + b"\n")
    assert [value for _, value in read_jsonl(path)] == [{"a": 1}]


def test_a_seed_that_no_generator_takes_is_refused(flags, capsys):
    for seed in (str(2**63), "1" * 30):
        with pytest.raises(SystemExit):
            train.main([*flags, "--seed", seed])
        assert "expected an integer from 0 to" in capsys.readouterr().err


def test_a_copied_run_keeps_its_offsets(flags, tmp_path):
    """heads.json may be missing beside offsets that were copied alone."""
    select_heads.main([*flags, *FAST, "--heads", "2"])
    train.main([*flags, *FAST])
    (tmp_path / "copy").mkdir()
    shutil.copy("runs/tiny/mquake/offsets.safetensors", tmp_path / "copy")
    eval_script.main([*flags, "--run", str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "results.json").exists()


def test_a_fold_of_a_task_without_folds_is_refused(flags):
    for script in (select_heads, train, eval_script):
        with pytest.raises(InputError, match="--fold: the task mquake has no folds; leave it out"):
            script.main([*flags, "--fold", "0"])
