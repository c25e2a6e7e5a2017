"""Offsets by name: several in one evaluation, from the hub, in the checkpoints of the paper."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import GOLDEN, difference, golden_prompts, make_run, slow_but
from lofit.run.adapters import load_tuned, open_adapter
from lofit.run.artefacts import hash_of_offsets, read_offsets, save_offsets
from safetensors.torch import load_file, save_file

import eval as eval_script
import train
from lofit.errors import InputError
from lofit.export import formats
from lofit.files import write_json
from lofit.heads import attach_offsets, attached_heads, edits_off
from lofit.llm.generate import generate

TRAIN = ["--epochs", "2", "--lr", "1", "--heads", "random", "--top", "3"]


@pytest.fixture
def flags(tiny_folder, small_data):
    return ["--model", str(tiny_folder), "--data", str(small_data)]


def read(path):
    return json.loads(path.read_text())


def test_several_adapters_in_one_evaluation(flags, tmp_path, capsys):
    a, b, c, both = (tmp_path / name for name in ("a", "b", "c", "both"))
    train.main([*flags, *TRAIN, "--run", str(a)])
    train.main([*flags, *TRAIN, "--run", str(b), "--seed", "1"])
    train.main([*flags, *TRAIN, "--run", str(c), "--task", "clutrr"])
    alone = []
    for run in (a, b):
        eval_script.main([*flags, "--run", str(run)])
        alone.append(read(run / "results.json"))
    capsys.readouterr()
    eval_script.main([*flags, "--run", str(both), "--offsets", str(a), str(b), str(c)])
    results, printed = read(both / "results.json"), capsys.readouterr().out
    assert list(results["adapters"]) == [str(a), str(b), str(c)] and "tuned" not in results
    for run, one in zip((a, b), alone, strict=True):
        found = results["adapters"][str(run)]
        for key in ("tuned", "difference", "heads", "seed", "trained_values"):
            assert found[key] == one[key]
        assert results["base"] == one["base"]
    assert [found["seed"] for found in results["adapters"].values()] == [42, 1, 42]
    lines = [json.loads(line) for line in (both / "predictions.jsonl").open()]
    assert {"base", str(a), str(b), str(c)} <= lines[0].keys()
    assert printed.count("95 % interval") == 3 and f"{b}, 3 heads, 24 trained values" in printed
    # one alone takes the place of the run's own
    eval_script.main([*flags, "--run", str(both), "--offsets", str(b)])
    assert read(both / "results.json")["tuned"] == alone[1]["tuned"]


def test_offsets_from_elsewhere_leave_the_runs_own_results(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*flags, *TRAIN, "--run", "runs/tiny/mquake"])
    eval_script.main(flags)
    before = (tmp_path / "runs/tiny/mquake/results.json").read_bytes()
    eval_script.main([*flags, "--offsets", "runs/tiny/mquake", "--task", "clutrr"])
    eval_script.main([*flags, "--offsets", "runs/tiny/mquake"])
    assert (tmp_path / "runs/tiny/mquake/results.json").read_bytes() == before
    names = sorted(path.name for path in (tmp_path / "runs/tiny").iterdir())
    assert names == ["clutrr-offsets", "mquake", "mquake-offsets"]


@pytest.mark.slow
def test_several_adapters_over_two_folds(tiny_folder, flags, tmp_path):
    config = read(tiny_folder / "config.json")
    (tiny_folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    train.main([*flags, *TRAIN, "--run", str(tmp_path / "other")])  # another task, without folds
    flags += ["--task", "truthfulqa"]
    for name, seed in (("a", "1"), ("b", "2")):
        train.main([*flags, *TRAIN, "--run", str(tmp_path / name), "--seed", seed])
    names = [str(tmp_path / name) for name in ("a", "b", "other")]
    eval_script.main([*flags, "--run", str(tmp_path / "both"), "--offsets", *names])
    whole = read(tmp_path / "both" / "results.json")
    parts = [read(tmp_path / "both" / f"fold{fold}" / "results.json") for fold in (0, 1)]
    for name in names:
        found = whole["adapters"][name]
        each = [part["adapters"][name] for part in parts]
        assert found["heads"] == [part["heads"] for part in each]
        assert found["tuned"]["mc1"] == pytest.approx(sum(p["tuned"]["mc1"] for p in each) / 2)
    with pytest.raises(InputError, match="trained with fold 0, asked for fold 1"):
        offsets = ["--offsets", str(tmp_path / "a" / "fold0")]
        eval_script.main([*flags, "--run", str(tmp_path / "c"), "--fold", "1", *offsets])
    with pytest.raises(InputError, match="a: a run of several folds; name one of them"):
        open_adapter(str(tmp_path / "a"))


def test_an_adapter_in_the_hubs_cache(flags, tmp_path, monkeypatch):
    train.main([*flags, *TRAIN, "--run", str(tmp_path / "run")])
    commit, cache = "0123456789" * 4, tmp_path / "cache"
    repo = cache / "models--owner--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    formats.main([str(tmp_path / "run"), "--format", "lofit", "--out", str(snapshot)])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    eval_script.main([*flags, "--run", str(tmp_path / "run")])
    own = read(tmp_path / "run" / "results.json")
    eval_script.main([*flags, "--run", str(tmp_path / "b"), "--offsets", "owner/adapter"])
    assert read(tmp_path / "b" / "results.json")["tuned"] == own["tuned"]
    adapter = open_adapter("owner/adapter")
    assert adapter.heads == [tuple(head) for head in own["heads"]] and adapter.folder == snapshot


def test_what_is_no_adapter_is_refused(flags, tiny_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "empty", "no offsets.safetensors in it"),
        (tmp_path / "gone", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            eval_script.main([*flags, "--run", str(tmp_path / "r"), "--offsets", str(name)])
    train.main([*flags, *TRAIN, "--run", str(tmp_path / "run")])
    weights = load_file(tiny_folder / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, tiny_folder / "model.safetensors")
    with pytest.raises(InputError, match="but this is .*; name that model with --model"):
        eval_script.main([*flags, "--run", str(tmp_path / "r"), "--offsets", str(tmp_path / "run")])


# The paper's released checkpoints


def release(base, folder, v, pad=None):
    """A checkpoint as the paper's code saves it: A and v of every head beside a model's tensors,
    and a row for padding. v: [layer, head, head_dim]."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    tensors = load_file(base / "model.safetensors")
    if pad is not None:
        for key, row in zip(("model.embed_tokens.weight", "lm_head.weight"), pad, strict=True):
            tensors[key] = torch.cat((tensors[key], row[None]))
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
    return release(tiny_folder, tmp_path / "released", v, pad), v


@pytest.mark.parametrize("rows_in_config", slow_but([891], [891, 892]))
@torch.no_grad()
def test_a_released_checkpoint_is_a_base_with_offsets(
    released, tiny, tmp_path, rows_in_config, small_data
):
    folder, v = released
    config = read(folder / "config.json") | {"vocab_size": rows_in_config}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_tuned(folder)
    assert attached_heads(model) == [(0, 1), (2, 0), (2, 3)]
    ids = torch.randint(0, 891, (2, 12), generator=torch.Generator().manual_seed(0))
    with edits_off(model):
        assert torch.equal(model(ids)[..., :891], tiny(ids))
    attach_offsets(tiny, attached_heads(model), v[v.any(-1)])
    want = tiny(ids)
    assert model(ids).shape[-1] == 892 and difference(model(ids)[..., :891], want) < 1e-6
    assert not any(p.requires_grad for p in model.parameters())

    # evaluated as it stands, and exported again: as our adapter and as a plain checkpoint
    flags = ["--model", str(folder), "--data", str(small_data)]
    eval_script.main([*flags, "--run", str(tmp_path / "own")])
    own = read(tmp_path / "own" / "results.json")
    assert own["trained_values"] == 24 and own["heads"] == [[0, 1], [2, 0], [2, 3]]
    assert own["share_of_base"] == 24 / (sum(p.numel() for p in tiny.parameters()) - 24 + 2 * 32)
    for form in ("lofit", "hf"):
        formats.main([str(folder), "--format", form, "--out", str(tmp_path / form)])
    eval_script.main([*flags, "--run", str(tmp_path / "b"), "--offsets", str(tmp_path / "lofit")])
    assert read(tmp_path / "b" / "results.json")["tuned"] == own["tuned"]
    plain = load_tuned(tmp_path / "hf")
    assert not attached_heads(plain) and difference(plain(ids), model(ids)) < 1e-5
    assert read(tmp_path / "hf" / "config.json")["vocab_size"] == 892


def test_scales_in_a_released_checkpoint_are_refused(released):
    folder, _ = released
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.attn_A.2"][3] = 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.attn_A\.2 is not zero"):
        load_tuned(folder)


def test_training_on_a_released_checkpoint_starts_from_its_base(released, small_data, tmp_path):
    flags = ["--model", str(released[0]), "--data", str(small_data), "--run", str(tmp_path / "run")]
    train.main([*flags, *TRAIN])
    heads = load_file(tmp_path / "run" / "offsets.safetensors")["heads"].tolist()
    eval_script.main(flags)
    assert read(tmp_path / "run" / "results.json")["heads"] == heads


@pytest.mark.parametrize(("v", "which"), [("v", "modified"), ("v_trained", "trained")])
@torch.no_grad()
def test_the_papers_own_numbers_from_a_released_checkpoint(tmp_path, v, which):
    golden, told = load_file(GOLDEN / "generate.safetensors"), read(GOLDEN / "generate.json")
    pad = (golden["pad_embed_row"], golden["pad_lm_head_row"])
    folder = release(GOLDEN, tmp_path / "released", golden[v], pad)
    formats.main([str(folder), "--format", "hf", "--out", str(tmp_path / "plain")])
    n, eos = told["max_new_tokens"], told["eos_token_id"]
    for name in (folder, tmp_path / "plain"):
        model = load_tuned(name)
        assert model.config.vocab_size == 1001
        new = generate(model, golden_prompts(golden), n, (eos,))
        filled = [row + [eos] * (n - len(row)) for row in new]
        assert torch.equal(torch.tensor(filled), golden[f"output_ids.{which}"][:, -n:])


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", {"a": 1}), ("fingerprint", None), ("fingerprint", ["x"]), ("model", 3),
     ("settings", "lr"), ("task", [1]), ("fold", "0"), ("seed", None)],
)  # fmt: skip
def test_metadata_of_a_wrong_type_ends_in_one_line(tiny_folder, tmp_path, key, value):
    make_run(tmp_path / "run", tiny_folder)
    path = tmp_path / "run" / "offsets.safetensors"
    heads, offsets, info = read_offsets(path)
    info = {k: v for k, v in (info | {key: value}).items() if v is not None}
    save_offsets(path, heads, offsets, info)
    if key == "seed":  # nobody needs it
        assert open_adapter(str(tmp_path / "run")).heads == heads
        return
    with pytest.raises(InputError, match=f"{key} is .*; expected a") as caught:
        open_adapter(str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_malformed_results_are_named_and_not_printed(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    adapter = open_adapter(str(tmp_path / "run"))
    results = {"fingerprint": adapter.info["fingerprint"], "tuned": {"em": "high"}}
    results["offsets_hash"] = hash_of_offsets(adapter.heads, adapter.offsets)
    for base in ({"em": 0.1}, {"em": [1]}, 7):
        write_json(tmp_path / "run" / "results.json", results | {"base": base})
        with pytest.raises(InputError, match="results.json: malformed .*run eval.py again"):
            adapter.results()


def test_nothing_is_written_into_the_hubs_cache(tiny_folder, tmp_path):
    make_run(tmp_path / "models--a--b" / "snapshots" / "abc", tiny_folder)
    adapter = open_adapter(str(tmp_path / "models--a--b" / "snapshots" / "abc"))
    assert adapter.folder_to_write() == Path()
