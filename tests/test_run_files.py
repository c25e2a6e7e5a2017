"""Offsets by name: several in one evaluation, from the hub, in the checkpoints of the paper."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from conftest import GOLDEN, difference, golden_prompts, make_run, run_export
from safetensors.torch import load_file, save_file

import eval as eval_script
import train
from lofit.errors import InputError
from lofit.files import read_tensors, write_tensors
from lofit.heads import attach_offsets, attached_offsets, edits_off
from lofit.inspect import report
from lofit.llm.checkpoint import load_model
from lofit.llm.generate import generate
from lofit.run.files import find_edits, load_offsets, save_heads, save_offsets
from lofit.run.tuned import open_tuned, read_results

BOTH = "runs/tiny/mquake-offsets/results.json"
TRAIN = ["--epochs", "1", "--lr", "1", "--heads", "random", "--top", "3"]


def read(path):
    return json.loads(path.read_text())


def test_several_adapters_in_one_evaluation(flags, tmp_path, capsys, monkeypatch):
    a, b, both = (tmp_path / name for name in ("a", "b", "both"))
    train.main([*flags, *TRAIN, "--run", str(a)])
    train.main([*flags, *TRAIN, "--run", str(b), "--task", "clutrr", "--seed", "1"])
    eval_script.main([*flags, "--run", str(a)])
    alone = read(a / "results.json")
    capsys.readouterr()
    eval_script.main([*flags, "--run", str(both), "--offsets", str(a), str(b)])
    results, printed = read(both / "results.json"), capsys.readouterr().out
    assert list(results["adapters"]) == ["a", "b"]
    assert results["scores"]["base"] == alone["scores"]["base"]
    assert results["scores"]["a"] == alone["scores"]["tuned"]
    assert results["differences"]["a"] == alone["differences"]["tuned"]
    assert results["adapters"]["a"] | {"offsets": ""} == (
        alone["adapters"]["tuned"] | {"offsets": ""}
    )
    assert [found["seed"] for found in results["adapters"].values()] == [42, 1]
    lines = [json.loads(line) for line in (both / "predictions.jsonl").open()]
    assert {"base", "a", "b"} <= lines[0].keys()
    assert "b: 3 heads, 24 trained values" in printed
    # a folder of that name does not take the place of the model without edits
    shutil.copytree(b, tmp_path / "base")
    eval_script.main([*flags, "--run", str(both), "--offsets", str(a), str(tmp_path / "base")])
    results = read(both / "results.json")
    assert list(results["scores"]) == ["base", str(a), str(tmp_path / "base")]
    assert results["scores"]["base"] == alone["scores"]["base"]
    # nor does one named as a key that stands beside the labels
    monkeypatch.chdir(tmp_path)
    for name in ("n", "prompt"):
        shutil.copytree(b, tmp_path / name)
    eval_script.main([*flags, "--run", str(both), "--offsets", "base", "n", "prompt", "b"])
    results = read(both / "results.json")
    labels = ["./base", "./n", "./prompt", "b"]
    assert list(results["scores"]) == ["base", *labels]
    assert all(group["n"] > 0 and {*labels} < group.keys() for group in results["groups"].values())
    first = json.loads((both / "predictions.jsonl").open().readline())
    assert first["prompt"] == lines[0]["prompt"]
    # trained again otherwise, with the same heads: the old results are of other offsets
    assert read_results(open_tuned(a))[0]["scores"]["tuned"] == alone["scores"]["tuned"]
    train.main([*flags, *TRAIN, "--lr", "0.1", "--run", str(a)])
    assert read_results(open_tuned(a)) == (None, [])


def test_a_run_finds_its_results_in_a_comparison(flags, tmp_path, monkeypatch):
    """The README's first commands: two runs are evaluated together, then a report is asked for."""
    monkeypatch.chdir(tmp_path)
    train.main([*flags, *TRAIN])
    train.main([*flags, *TRAIN, "--task", "clutrr"])
    names = ["runs/tiny/mquake-random", "runs/tiny/clutrr-random"]
    eval_script.main([*flags, "--offsets", *names])
    (results, lines), shown = read_results(open_tuned(names[0])), read(tmp_path / BOTH)
    assert results["scores"] == {
        "base": shown["scores"]["base"], "tuned": shown["scores"]["mquake-random"]
    }  # fmt: skip
    assert results["differences"] == {"tuned": shown["differences"]["mquake-random"]}
    assert len(lines) == 20 and all(e["tuned"] == e["mquake-random"] for e in lines)
    score = f"{100 * results['scores']['tuned']['em_stripped']:.1f} %"
    card = f'<b>{score}</b><span class="soft">em_stripped of the tuned model'
    assert card in report.page(names[:1])[1]
    # what other offsets score on this task is no result of theirs
    assert read_results(open_tuned(names[1])) == (None, [])


def test_an_adapter_in_the_hubs_cache(tiny, tiny_folder, tmp_path, monkeypatch):
    commit, cache = "0123456789" * 4, tmp_path / "cache"
    repo = cache / "models--owner--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    attach_offsets(tiny, [(1, 2), (0, 3)], torch.randn(2, 8))
    save_offsets(snapshot, tiny)
    found = open_tuned("owner/adapter")
    assert found.path == snapshot / "offsets.safetensors"
    assert attached_offsets(found.model)[0] == [(0, 3), (1, 2)]
    assert str(found.folder_to_write) == "."  # not the hub's cache


@pytest.mark.parametrize(
    ("changed", "tensors", "message"),
    [
        ({"version": 1}, {}, r"of another version .*\(1, expected 2\); run train.py again"),
        ({"version": None}, {}, "of another version of this program"),
        ({"fingerprint": "0" * 16}, {}, "made for model .*, but this run is for .*; run train.py"),
        ({"method": "magic"}, {}, "method 'magic': expected one of"),
        ({"method": "lora"}, {}, "do not fit; lora has"),
        ({}, {"heads": torch.tensor([[0, 9]] * 5)}, "there is no head 9 in layer 0"),
        ({}, {"heads": torch.tensor([[0, 1]] * 5)}, "none of them twice"),
        ({}, {"heads": torch.tensor([0, 1])}, "missing or malformed"),
        ({}, {"heads": torch.tensor([[0, 1, 1]] * 5)}, "malformed"),
        ({}, {"offsets": torch.full((5, 8), torch.nan)}, "offsets is not finite; train again"),
        ({}, {"offsets": torch.zeros(5, 7)}, r"shape \[5, 7\], this model needs \[5, 8\]"),
        ({}, {"offsets": torch.zeros(4, 8)}, r"shape \[4, 8\], this model needs \[5, 8\]"),
    ],
)
def test_malformed_offsets_are_refused(tiny, tiny_folder, tmp_path, changed, tensors, message):
    make_run(tmp_path / "run", tiny_folder)
    path = tmp_path / "run" / "offsets.safetensors"
    before, info = read_tensors(path)
    write_tensors(path, before | tensors, info | changed)
    with pytest.raises(InputError, match=message) as caught:
        load_offsets(tmp_path / "run", tiny)
    assert str(path) in str(caught.value)
    assert not attached_offsets(tiny)[0]  # the model is as it was


def test_what_holds_no_offsets_is_refused(tmp_path):
    with pytest.raises(InputError, match="offsets.safetensors: no such file; run train.py first"):
        find_edits(tmp_path)
    (tmp_path / "heads.json").write_text("{}")
    with pytest.raises(InputError, match="only step 1 was run; run train.py first"):
        find_edits(tmp_path)
    scores = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(InputError, match="a head's score is not finite"):
        save_heads(tmp_path / "new" / "heads.json", [(0, 0)], scores, {})
    assert not (tmp_path / "new").exists()


# The paper's released checkpoints


def release(base, folder, v, pad=None):
    """A checkpoint as the paper's code saves it: A and v of every head beside a model's tensors,
    and a row for padding. v: [layer, head, head_dim]."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    tensors = load_file(base / "model.safetensors")
    for key, row in zip(("model.embed_tokens.weight", "lm_head.weight"), pad or (), strict=False):
        tensors[key] = torch.cat((tensors[key], row[None]))
    config = read(folder / "config.json") | {"vocab_size": len(tensors["lm_head.weight"])}
    (folder / "config.json").write_text(json.dumps(config))
    for layer, heads in enumerate(v):
        for head, offset in enumerate(heads):
            stem = f"model.layers.{layer}.self_attn.attn_"
            tensors[f"{stem}v.{head}"] = offset.clone()
            tensors[f"{stem}A.{head}"] = torch.zeros_like(offset)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def released(tiny_folder, tmp_path):
    """(folder, v) of such a checkpoint of the tiny model, with offsets on 3 of 12 heads."""
    v = torch.zeros(3, 4, 8)
    for layer, head in ((2, 3), (0, 1), (2, 0)):
        v[layer, head] = torch.randn(8, generator=torch.Generator().manual_seed(head))
    pad = torch.randn(2, 32, generator=torch.Generator().manual_seed(9)) * 0.01
    return release(tiny_folder, tmp_path / "released", v, tuple(pad)), v


@torch.no_grad()
def test_a_released_checkpoint_is_a_base_with_offsets(released, tiny, tmp_path, small_data):
    folder, v = released
    model = open_tuned(str(folder)).model
    assert attached_offsets(model)[0] == [(0, 1), (2, 0), (2, 3)]
    ids = torch.randint(0, 891, (2, 12), generator=torch.Generator().manual_seed(0))
    with edits_off(model):
        assert torch.equal(model(ids)[..., :891], tiny(ids))
    attach_offsets(tiny, attached_offsets(model)[0], v[v.any(-1)])
    assert model(ids).shape[-1] == 892 and difference(model(ids)[..., :891], tiny(ids)) < 1e-6
    # evaluated as it stands, and exported as a plain checkpoint
    flags = ["--model", str(folder), "--data", str(small_data), "--run", str(tmp_path / "own")]
    eval_script.main([*flags, "--offsets", str(folder)])
    own = read(tmp_path / "own" / "results.json")["adapters"]["tuned"]
    assert own["trained_values"] == 24 and own["heads"] == [[0, 1], [2, 0], [2, 3]]
    plain = load_model(run_export(folder, "hf", tmp_path / "hf"))
    assert difference(plain(ids), model(ids)) < 1e-5


def test_scales_in_a_released_checkpoint_are_refused(released):
    folder, _ = released
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.attn_A.2"][3] = 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.attn_A\.2 is not zero"):
        open_tuned(str(folder))


@pytest.mark.parametrize(("v", "which"), [("v", "modified"), ("v_trained", "trained")])
@torch.no_grad()
def test_the_papers_own_numbers_from_a_released_checkpoint(tmp_path, v, which):
    golden, about = load_file(GOLDEN / "generate.safetensors"), read(GOLDEN / "generate.json")
    pad = (golden["pad_embed_row"], golden["pad_lm_head_row"])
    folder = release(GOLDEN, tmp_path / "released", golden[v], pad)
    out = run_export(folder, "hf", tmp_path / "plain")
    n, eos = about["max_new_tokens"], about["eos_token_id"]
    for model in (open_tuned(str(folder)).model, load_model(out)):
        assert model.config.vocab_size == 1001
        new = generate(model, golden_prompts(golden), n, (eos,))
        filled = [row + [eos] * (n - len(row)) for row in new]
        assert torch.equal(torch.tensor(filled), golden[f"output_ids.{which}"][:, -n:])
