"""What the steps hand to one another is refused where it could say something wrong."""

import json

import pytest
import torch
from conftest import make_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as eval_script
import train
from lofit.errors import InputError
from lofit.heads import attached_offsets
from lofit.llm.checkpoint import load_model
from lofit.run.files import load_offsets, read_results, save_heads


@pytest.fixture
def run(tiny_folder, tmp_path):
    make_run(tmp_path / "run", tiny_folder)
    return tmp_path / "run"


BAD = {
    "halves of heads": (lambda t: {"heads": t["heads"] + 0.5}, "expected heads in int64"),
    "nan": (lambda t: {"offsets": t["offsets"] * float("nan")}, "offsets is not finite; train"),
    "inf": (lambda t: {"offsets": t["offsets"] / 0}, "offsets is not finite; train again"),
    "other widths": (lambda t: {"offsets": t["offsets"][:, :3].clone()}, "offsets: shape"),
    "fewer offsets": (lambda t: {"offsets": t["offsets"][1:].clone()}, "offsets: shape"),
    "other heads": (lambda t: {"heads": t["heads"] + 9}, "there is no head"),
    "three numbers": (lambda t: {"heads": t["heads"][:, [0, 1, 1]]}, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_offsets_that_cannot_be_right_leave_the_model_alone(run, tiny_folder, name):
    path, (spoil, message) = run / "offsets.safetensors", BAD[name]
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file(tensors | spoil(tensors), path, header)
    model = load_model(tiny_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_offsets(run, model)
    assert str(path) in str(caught.value)
    assert not attached_offsets(model)[0]


def test_scores_that_are_not_finite_are_not_written(tmp_path):
    scores = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(InputError, match="a head's score is not finite"):
        save_heads(tmp_path / "heads.json", [(0, 0)], scores, {})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def flags(tiny_folder, small_data, tmp_path):
    return ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "run")]


def test_results_are_shown_of_these_offsets_only(flags, tmp_path):
    """Trained again otherwise, with the same heads: the old results are of other offsets."""
    run = tmp_path / "run"
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.3"])
    assert read_results(run) is None
    eval_script.main(flags)
    assert read_results(run)["scores"]["tuned"]
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.1"])
    assert read_results(run) is None


def test_half_a_surrogate_pair_is_written_and_read(flags, small_data, tmp_path):
    """It crashed the evaluation after all of its work."""
    path = small_data / "MQuAKE" / "test.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    case = json.loads(first) | {"new_answer": "Nor\ud800via"}
    path.write_text(json.dumps(case) + "\n" + "".join(others))
    eval_script.main([*flags, "--base-only"])
    line = json.loads((tmp_path / "run" / "predictions-base.jsonl").open().readline())
    assert line["answer"] == "Nor\ud800via"
