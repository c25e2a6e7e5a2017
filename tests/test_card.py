"""What a model card says."""

import pytest
from conftest import make_run, run_export

from lofit.files import hash_of, read_tensors, write_json, write_tensors

CHANGE = {"em": {"value": 0.5, "ci95": [0.4, 0.6]}}


def card(tmp_path, form: str, *flags: str) -> str:
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    return (run_export(tmp_path / "run", form, out, *flags) / "README.md").read_text()


def test_the_card_says_what_it_is(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", tiny_folder)
    (tiny_folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n")
    text = card(tmp_path, "peft")
    for part in ("license: other", "license_name: mine", "library_name: peft", "pipeline_tag: text",
                 "| task | mquake |", "| seed | 7 |", "lr 0.5", "Not evaluated", "| 40 |",
                 "|---|---|\n| base model |", "code |\n| task | mquake |\n| heads",
                 f'from_pretrained("{tiny_folder}")', '"out-0")'):  # fmt: skip
        assert part in text
    assert "base_model:" not in text  # a path is no name on the hub
    (tmp_path / "owner").mkdir()
    tiny_folder.rename("owner/name")
    text = card(tmp_path, "peft", "--model", "owner/name")
    assert "\nbase_model: owner/name\n" in text and "- base_model:adapter:owner/name\n" in text
    text = card(tmp_path, "hf", "--model", "owner/name")  # the base has moved
    assert (tmp_path / "out-2" / "tokenizer.json").exists()
    assert "\nbase_model: owner/name\n" in text and "base_model:adapter" not in text
    assert "vLLM 0.32.0 (CPU)" in text and "serve the base model" not in text


@pytest.mark.parametrize("chat", [True, False])
def test_the_command_asks_as_it_was_trained(tiny_folder, tmp_path, chat):
    make_run(tmp_path / "run", tiny_folder)
    path = tmp_path / "run" / "offsets.safetensors"
    tensors, info = read_tensors(path)
    settings = {"dtype": "bfloat16", "quantize": "nf4" if chat else "stored"}
    write_tensors(path, tensors, info | {"chat": chat, "settings": settings})
    text = card(tmp_path, "peft")
    command = next(line for line in text.splitlines() if line.startswith("python eval.py"))
    assert f"--model {tiny_folder} --task mquake" in command and "--dtype bfloat16" in command
    assert ("--chat" in command) == chat == ("apply_chat_template" in text)
    assert ("--quantize nf4" in command) == chat and "stored" not in command
    assert "--task mquake --data data/mini " in command  # the recorded data, not the default's
    assert command.endswith(f"--offsets {tmp_path / 'run'}")
    write_tensors(path, tensors, info | {"data": "far/mydata", "task": "mydata"})
    assert " --task far/mydata --offsets " in card(tmp_path, "peft")


def test_scores_are_those_of_these_offsets(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    path = tmp_path / "run" / "offsets.safetensors"
    results = {"split": "test", "n": 9, "differences": {"tuned": CHANGE}} | read_tensors(path)[1]
    results["scores"] = {"base": {"em": 0.25}, "tuned": {"em": 0.75}}
    results["adapters"] = {"tuned": {"offsets_hash": hash_of(path)}}
    write_json(tmp_path / "run" / "results.json", results)
    text = card(tmp_path, "peft")
    assert "mquake, test split, 9 items" in text and "25.0%    75.0%   +50.0 [+40.0, +60.0]" in text
    make_run(tmp_path / "run", tiny_folder, seed=1)
    assert "Not evaluated" in card(tmp_path, "peft")


@pytest.mark.parametrize(
    ("base", "form", "warned"),
    [("mini-gemma", "hf", True), ("mini-gemma", "peft", False), ("mini-llama", "hf", False)],
)
def test_the_card_of_a_gemma_1_warns_of_vllm(base, form, warned, tmp_path):
    make_run(tmp_path / "run", f"weights/{base}")
    text = card(tmp_path, form)
    assert "base_model:" not in text  # a folder of this repository, not of the hub
    assert ("**vLLM's own Gemma 1" in text) is warned
    assert ("`python -m lofit.export RUN --format hf`" in text) is (form == "peft")
