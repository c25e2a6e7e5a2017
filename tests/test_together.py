"""Files that belong together: what each script refuses to combine, and whose results it shows."""

import json
import os
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
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import load_model
from lofit.run.files import save_offsets

FAST = ["--epochs", "1", "--lr", "0.05"]


@pytest.fixture
def flags(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return flags


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
    assert len(results["adapters"]["tuned"]["heads"]) == 1 and results["plain"]


def test_eval_takes_what_was_trained_last_and_says_so(flags, capsys):
    train.main([*flags, *FAST, "--heads", "all"])
    train.main([*flags, "--method", "lora", *FAST])
    eval_script.main(flags)
    out = capsys.readouterr().out
    assert "evaluating runs/tiny/mquake-lora, trained last; --run chooses another" in out
    assert read("runs/tiny/mquake-lora/results.json")["adapters"]["tuned"]["method"] == "lora"
    assert not os.path.exists("runs/tiny/mquake-all/results.json")
    eval_script.main([*flags, "--run", "runs/tiny/mquake-all"])
    assert "method" not in read("runs/tiny/mquake-all/results.json")["adapters"]["tuned"]


def test_results_of_other_splits_and_of_the_base_alone_replace_nothing(flags):
    def lines(name):
        with open(f"runs/tiny/own/predictions{name}.jsonl") as found:
            return [json.loads(line) for line in found]

    run = ["--run", "runs/tiny/own"]
    eval_script.main([*flags, *run, "--split", "val", "--base-only"])  # needs no offsets
    train.main([*flags, "--epochs", "2", "--lr", "1", "--heads", "all", *run])
    eval_script.main([*flags, *run])
    before = open("runs/tiny/own/results.json").read()
    for extra in (["--split", "val"], ["--base-only"]):
        eval_script.main([*flags, *run, *extra])
    assert open("runs/tiny/own/results.json").read() == before
    found = [read(run[1], f"results{name}.json") for name in ("-val", "-base", "-val-base")]
    assert [(f["split"], f["n"]) for f in found] == [("val", 12), ("test", 20), ("val", 12)]
    assert ["tuned" in f["scores"] for f in found] == [True, False, False]
    assert not found[2]["adapters"]
    base = [[line["base"] for line in lines(name)] for name in ("-val", "-val-base")]
    assert base[0] == base[1] != [line["tuned"] for line in lines("-val")]


def test_heads_chosen_again_make_old_offsets_unusable(flags, tmp_path):
    select_heads.main([*flags, *FAST, "--heads", "2"])
    train.main([*flags, *FAST])
    select_heads.main([*flags, *FAST, "--heads", "2"])  # the same heads: the same file
    eval_script.main(flags)
    select_heads.main([*flags, *FAST, "--heads", "3"])
    with pytest.raises(
        InputError, match="trained before heads.json beside it was written; run train"
    ):
        eval_script.main(flags)
    eval_script.main([*flags, "--offsets", "runs/tiny/mquake"])
    # heads.json may be missing beside offsets that were copied alone
    (tmp_path / "copy").mkdir()
    shutil.copy("runs/tiny/mquake/offsets.safetensors", tmp_path / "copy")
    eval_script.main([*flags, "--run", str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "results.json").exists()
    train.main([*flags, *FAST])
    eval_script.main(flags)


def test_not_the_name_of_a_data_folder_decides_but_what_is_in_it(flags, tmp_path):
    one, two = own_task(tmp_path / "a" / "mine"), own_task(tmp_path / "b" / "mine", " Bob")
    model = flags[:2]
    select_heads.main([*model, "--task", one, *FAST, "--heads", "2"])
    with pytest.raises(InputError, match="heads.json: made for data .*; run select_heads.py again"):
        train.main([*model, "--task", two, *FAST])
    train.main([*model, "--task", one, *FAST])
    assert read("runs/tiny/mine/heads.json")["data"] == one  # not --data
    with pytest.raises(InputError, match="offsets.safetensors: made for data .*; run train.py aga"):
        eval_script.main([*model, "--task", two])
    # moved, its bytes are the same
    shutil.move(tmp_path / "a", tmp_path / "c")
    moved = tmp_path / "c" / "mine"
    train.main([*model, "--task", str(moved), *FAST])
    eval_script.main([*model, "--task", str(moved)])
    path = moved / "train.jsonl"
    path.write_text(path.read_text().replace("Ann", "Joe"))
    with pytest.raises(InputError, match="offsets.safetensors: made for data .*; run train.py aga"):
        eval_script.main([*model, "--task", str(moved)])


def test_files_of_another_model_are_not_taken(flags, tiny_folder):
    """Other weights, if only of one row, in the folder of the same name."""
    select_heads.main([*flags, *FAST, "--heads", "2"])
    train.main([*flags, *FAST])
    path = tiny_folder / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][700, 3] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="offsets.safetensors: made for model .* but this run"):
        eval_script.main(flags)
    with pytest.raises(InputError, match="heads.json: made for model .*; run select_heads.py"):
        train.main([*flags, *FAST])
    with pytest.raises(InputError, match="offsets.safetensors: made for model"):
        eval_script.main([*flags, "--offsets", "runs/tiny/mquake"])


def test_another_dtype_or_no_template_is_evaluated_with_a_warning(flags, tiny_folder, capsys):
    train.main([*flags, *FAST, "--heads", "random", "--dtype", "float32"])
    eval_script.main([*flags, "--dtype", "bfloat16"])
    err = capsys.readouterr().err
    assert "trained with dtype float32, evaluated with dtype bfloat16" in err
    eval_script.main([*flags, "--dtype", "float32"])
    assert "warning" not in capsys.readouterr().err

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tiny_folder / "chat_template.jinja").write_text(template)
    own = ["--run", "runs/chat", "--chat"]
    train.main([*flags, *FAST, "--heads", "random", *own])
    assert "--chat" in capsys.readouterr().out.splitlines()[-1]  # the command that evaluates it
    with pytest.raises(InputError, match="made for chat True, but this run is for False"):
        eval_script.main([*flags, *own[:2]])
    eval_script.main([*flags, "--offsets", "runs/chat"])
    assert "trained with chat True, evaluated with chat False" in capsys.readouterr().err
    eval_script.main([*flags, *own])
    assert "warning" not in capsys.readouterr().err


def test_offsets_of_ones_own_code_were_trained_without_a_template(flags, tiny_folder, capsys):
    model = load_model(tiny_folder)
    attach_offsets(model, [(1, 1)], torch.ones(1, model.config.head_dim))
    save_offsets("mine", model)
    eval_script.main([*flags, "--dtype", "float32", "--offsets", "mine"])
    assert "warning" not in capsys.readouterr().err
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tiny_folder / "chat_template.jinja").write_text(template)
    eval_script.main([*flags, "--dtype", "float32", "--offsets", "mine", "--chat"])
    assert "trained with chat None, evaluated with chat True" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["mquake", "truthfulqa-0"])
def test_outputs_that_are_not_finite_end_an_evaluation(flags, tiny_folder, task):
    path = tiny_folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"].mul_(1e30)
    weights["model.layers.0.mlp.up_proj.weight"].mul_(1e30)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="the model's outputs are not finite"):
        eval_script.main([*flags, "--task", task, "--base-only"])
    assert not os.path.exists(f"runs/tiny/{task}/results-base.json")


def test_a_long_reference_can_be_met(flags, tmp_path, monkeypatch):
    """Limits follow the model for own data, not the paper's 32 new tokens and 400 of an example."""
    task, asked = own_task(tmp_path / "long", " the" * 60), []
    monkeypatch.setattr(
        "lofit.evaluation.generate_all",
        lambda model, prompts, n, *rest: asked.append(n) or [[] for _ in prompts],
    )
    eval_script.main([*flags[:2], "--task", task, "--base-only"])
    assert asked[0] > 60
    config = read(flags[1], "config.json") | {"max_position_embeddings": 1024}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    longer = own_task(tmp_path / "longer", " the" * 500)
    select_heads.main([*flags[:2], "--task", longer, *FAST, "--heads", "2"])


def test_texts_that_the_tokenizer_cannot_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = own_task(tmp_path / "foreign", " Wasserfall Straßenbahn Eichhörnchen Zwiebel")
    with pytest.raises(InputError, match="of the tokens are unknown to this model's tokenizer"):
        train.main(["--model", str(MINI), "--task", task, "--heads", "all", *FAST])
