"""What a model card says."""

import json

from conftest import MINI, MINI_GEMMA, make_run, run_export
from lofit.run.artefacts import hash_of_offsets, read_offsets


def test_the_card_says_what_it_is(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", tiny_folder)
    (tiny_folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n")
    card = (run_export(tmp_path / "run", "peft", tmp_path / "one") / "README.md").read_text()
    for text in ("license: other", "license_name: mine", "library_name: peft", "pipeline_tag: text",
                 "| task | mquake |", "| seed | 7 |", "lr 0.5", "Not evaluated",
                 f'from_pretrained("{tiny_folder}")', '"one")'):  # fmt: skip
        assert text in card
    assert "base_model:" not in card  # a path is no name on the hub
    (tmp_path / "owner").mkdir()
    tiny_folder.rename("owner/name")
    named = ["--model", "owner/name"]
    card = (run_export(tmp_path / "run", "peft", tmp_path / "id", *named) / "README.md").read_text()
    assert "\nbase_model: owner/name\n" in card and "- base_model:adapter:owner/name\n" in card
    card = (run_export(tmp_path / "run", "hf", tmp_path / "hf", *named) / "README.md").read_text()
    assert "\nbase_model: owner/name\n" in card and "base_model:adapter" not in card
    assert "vLLM 0.32.0 (CPU)" in card and "serve the base model" not in card
    told = json.loads((tmp_path / "run" / "lofit_config.json").read_text())
    change = {"em": {"value": 0.5, "ci95": [0.4, 0.6]}}
    heads, offsets, _ = read_offsets(tmp_path / "run" / "offsets.safetensors")
    results = {"fingerprint": told["fingerprint"], "heads": told["heads"], "task": "mquake"}
    results["offsets_hash"] = hash_of_offsets(heads, offsets)
    results |= {"split": "test", "n": 9, "base": {"em": 0.25}, "tuned": {"em": 0.75}}
    path = tmp_path / "run" / "results.json"
    path.write_text(json.dumps(results | {"difference": change}))
    card = (
        run_export(tmp_path / "run", "lofit", tmp_path / "two", *named) / "README.md"
    ).read_text()
    assert "mquake, test split, 9 items" in card and "25.0%    75.0%   +50.0 [+40.0, +60.0]" in card
    path.write_text(json.dumps(results | {"difference": change, "offsets_hash": "of others"}))
    card = (
        run_export(tmp_path / "run", "lofit", tmp_path / "three", *named) / "README.md"
    ).read_text()
    assert "Not evaluated" in card


def test_the_card_of_a_gemma_1_warns_of_vllm(tmp_path):
    for base, form, warned in (
        (MINI_GEMMA, "hf", True), (MINI_GEMMA, "peft", False), (MINI, "hf", False),
    ):  # fmt: skip
        make_run(tmp_path / "run", base)
        out = run_export(tmp_path / "run", form, tmp_path / f"{base.name}-{form}")
        card = (out / "README.md").read_text()
        assert ("**Not with vLLM's own Gemma 1" in card) is warned
        assert ("`python -m lofit.export RUN --format hf`" in card) is (form == "peft")
