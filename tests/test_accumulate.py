"""A batch in parts has the gradient of the whole batch."""

import pytest
import torch
from conftest import MINI

import train
from lofit.heads import attach_offsets
from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import Accumulated, CrossEntropy, Preference, mean_loss
from lofit.run.files import load_offsets

LONG = "Q: What is the capital of Braviland? A:"
TEXTS = [(LONG, " Braviland"), ("Q: Who?", " the the the the"), ("A:", " Who"), (LONG, " Q Q")]


def objective(kind, model):
    if kind is CrossEntropy:
        return CrossEntropy(model, load_tokenizer(MINI), TEXTS)
    return Preference(model, load_tokenizer(MINI), [(p, a, " is") for p, a in TEXTS])


@pytest.mark.parametrize("kind", [CrossEntropy, Preference])
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_loss_and_gradients_are_those_of_the_whole_batch(kind, parts):
    """The parts have different numbers of answer tokens: a mean of their means would differ."""
    model, rows = load_model(MINI), [0, 1, 2, 3]
    whole = objective(kind, model)
    apart, found = Accumulated(whole, parts), []
    for each in (whole, apart):
        parameters = attach_offsets(model, [(1, 2), (6, 3)], torch.full((2, 16), 0.2))
        loss = each.loss(each.batch(rows))
        (3 * loss).backward()
        found.append([loss.detach(), *(p.grad for p in parameters)])
        assert each.weight(each.batch(rows)) == whole.weight(whole.batch(rows))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert mean_loss(apart, 3) == pytest.approx(mean_loss(whole, 3), rel=1e-5)


def test_an_epoch_of_4_x_2_ends_as_one_of_batches_of_8(tmp_path, small_data):
    offsets = []
    for parts in ("1", "4"):
        run = tmp_path / parts
        train.main([
            "--data", str(small_data), "--dtype", "float32", "--heads", "random", "--top", "4",
            "--epochs", "1", "--accumulate", parts, "--run", str(run),
        ])  # fmt: skip
        model = load_model(MINI)
        load_offsets(run, model)
        offsets.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    one, other = offsets
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()
