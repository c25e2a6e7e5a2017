"""What the steps hand to one another is refused where it could say something wrong."""

import json

import pytest
import torch
from conftest import make_run, run_export
from lofit.run.adapters import open_adapter
from lofit.run.artefacts import hash_of_offsets, read_offsets
from safetensors.torch import load_file, save_file

import eval as eval_script
import train
from lofit.errors import InputError


@pytest.fixture
def run(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    return tmp_path / "run"


def rewrite(run, **changed):
    """The run's offsets.safetensors with other tensors under its old header."""
    path = run / "offsets.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | changed, path, metadata)
    return path


def test_heads_that_are_no_integers_are_refused(run):
    """As floats they attached nothing, and eval.py gave the base scores as the tuned ones."""
    heads = load_file(run / "offsets.safetensors")["heads"]
    with pytest.raises(InputError, match="expected heads in int64 and offsets in float32"):
        read_offsets(rewrite(run, heads=heads + 0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_offsets_that_are_not_finite_are_refused(run, tmp_path, value):
    offsets = load_file(run / "offsets.safetensors")["offsets"]
    offsets[1, 2] = value
    path = rewrite(run, offsets=offsets)
    with pytest.raises(InputError, match="an offset is not finite; train again"):
        read_offsets(path)
    with pytest.raises(InputError, match="an offset is not finite"):
        run_export(run, "lofit", tmp_path / "out")


def test_the_hash_is_of_heads_and_values():
    heads, offsets = [(0, 1), (2, 3)], torch.randn(2, 8)
    found = hash_of_offsets(heads, offsets)
    assert len(found) == 16 and found == hash_of_offsets(heads, offsets.clone())
    assert found != hash_of_offsets(heads[::-1], offsets) and found != hash_of_offsets(
        heads, offsets + 1
    )


def test_a_card_shows_scores_of_these_offsets_only(tiny_folder, small_data, tmp_path):
    """Trained again otherwise, with the same heads: the old results are of other offsets."""
    run = tmp_path / "run"
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run)]
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.3"])
    eval_script.main(flags)
    assert open_adapter(str(run)).results() is not None
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.1"])
    assert open_adapter(str(run)).results() is None
    card = (run_export(run, "lofit", tmp_path / "out") / "README.md").read_text()
    assert "Not evaluated" in card


def test_half_a_surrogate_pair_is_written_and_read(tiny_folder, small_data, tmp_path):
    """It crashed the evaluation after all of its work."""
    path = small_data / "MQuAKE" / "test.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    case = json.loads(first)
    case["new_answer"] = "Nor\ud800via"
    path.write_text(json.dumps(case) + "\n" + "".join(others))
    run = tmp_path / "run"
    eval_script.main(
        ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run), "--base-only"]
    )
    assert (
        json.loads((run / "predictions-base.jsonl").open().readline())["answer"] == "Nor\ud800via"
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"], ["--batch-size", "0"], ["--lr", "nan"], ["--lr", "0"], ["--lr", "inf"],
        ["--seed", "-1"], ["--epochs", "2.5"],
    ],
)  # fmt: skip
def test_flags_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    assert stopped.value.code == 2 and f"argument {flags[0]}: expected a" in capsys.readouterr().err
