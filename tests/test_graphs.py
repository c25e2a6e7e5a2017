"""Steps as CUDA graphs: the padded way against the plain one; captures where there is a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU, REPO, SEES_GPU, difference

from lofit.compare.selection import head_gradients
from lofit.fast.graphs import MULTIPLE, GraphedObjective
from lofit.fast.hidden_cache import HiddenCache
from lofit.heads import attach_offsets, attach_scales, random_init
from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import BETA, CrossEntropy, Preference, mean_loss
from lofit.training import Schedule, make_optimizer, train_step

PAIRS = [
    ("Q: Who is it? A:", "the capital", "city"),
    ("Q: What is the sport of it? A:", "city", "the capital of the country of it"),
    ("Q: Is it? A:", "country", "sport"),
    ("Q: What is the capital of the country of the sport? A:", "the", "it"),
]


def make(kind, model, folder):
    n = 2 if kind is CrossEntropy else 3
    return HiddenCache(kind(model, load_tokenizer(folder), [pair[:n] for pair in PAIRS]))


def loss(objective, rows):
    return objective.loss(objective.batch(rows))


def edit(model, where):
    """Scales of all heads, offsets of every layer, or offsets from layer 1 or 2 on."""
    torch.manual_seed(0)
    if where == "scales":
        return attach_scales(model, random_init(model, 12, 0).view(3, 4, -1) * 100)
    heads = [(layer, 1) for layer in range(3) if layer >= where]
    return attach_offsets(model, heads, torch.randn(len(heads), 8))


@pytest.mark.parametrize("where", ["scales", 0, 1, 2])
@pytest.mark.parametrize("kind", [CrossEntropy, Preference])
def test_the_padded_way_has_the_losses_and_gradients_of_the_plain_one(
    tiny, tiny_folder, kind, where
):
    """With one text a row and as trees, with and without states from the first time."""
    parameters = edit(tiny, where)
    plain = make(kind, tiny, tiny_folder)
    padded = GraphedObjective(make(kind, tiny, tiny_folder), capture=False)
    # DPO's loss is a difference of log-probabilities that are far larger: their rounding is in it
    size = BETA * plain.objective.reference.abs().max().item() if kind is Preference else 0
    for rows in ([0, 1, 2, 3], [2, 0], [3, 1, 0, 2], [1]):
        batch = padded.batch(rows)
        assert batch.layer == (0 if where == "scales" else where)
        assert batch.ids.shape[1] % MULTIPLE == 0 == len(batch.target) % MULTIPLE
        want, found = loss(plain, rows), padded.loss(batch)
        assert found.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6 * size)
        wanted = torch.autograd.grad(want, parameters)
        for ours, theirs in zip(torch.autograd.grad(found, parameters), wanted, strict=True):
            assert difference(ours, theirs) < 1e-6 + 1e-5 * theirs.abs().max()


def test_a_padded_target_counts_for_nothing(tiny, tiny_folder):
    """Whatever the padding holds: a weight that is ignored would change the loss."""
    edit(tiny, 1)
    padded = GraphedObjective(make(CrossEntropy, tiny, tiny_folder), capture=False)
    batch = padded.batch([0, 1])
    n = padded.weight(batch)
    assert n < len(batch.weight) and batch.weight[:n].all()
    batch.target[n:] = 7
    assert padded.loss(batch).item() == loss(padded, [0, 1]).item()


def test_it_takes_the_place_of_an_objective(tiny, tiny_folder):
    """In a training, in a mean over a split, in a pass of gradients."""
    plain = make(CrossEntropy, tiny, tiny_folder)
    padded = GraphedObjective(make(CrossEntropy, tiny, tiny_folder), capture=False)
    assert mean_loss(padded, 2) == mean_loss(plain, 2)
    one, two = (head_gradients(tiny, each, 2) for each in (plain, padded))
    assert difference(one, two) < 1e-5
    results = []
    for objective in (plain, padded):
        parameters = edit(tiny, 1)
        schedule = Schedule(lr=0.05, epochs=3, batch_size=2, l1=1e-3)
        optimizer = make_optimizer(parameters, schedule)
        for step in range(6):
            rows = [0, 1] if step % 2 else [2, 3]
            train_step(optimizer, loss(objective, rows), schedule, step, 6)
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert difference(*results) < 1e-5


def test_where_a_capture_fails_the_steps_run_eagerly(tiny, tiny_folder, monkeypatch, capsys):
    edit(tiny, 1)
    padded = GraphedObjective(make(CrossEntropy, tiny, tiny_folder), capture=False)
    padded.capture = True

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(padded, "_captured", fails)
    want = loss(make(CrossEntropy, tiny, tiny_folder), [0, 1]).item()
    for _ in range(2):
        assert loss(padded, [0, 1]).item() == pytest.approx(want, rel=1e-6)
    err = capsys.readouterr().err
    assert (
        err
        == "no CUDA graphs, steps run eagerly: operation not permitted when stream is capturing\n"
    )


def replays_on_a_gpu(folder: str) -> None:
    """Run by the next test in a process that sees the GPU."""
    for where in ("scales", 0, 1):
        for kind in (CrossEntropy, Preference):
            model = load_model(folder, device="cuda")
            parameters = edit(model, where)
            plain = make(kind, model, folder)
            graphed = GraphedObjective(make(kind, model, folder))
            for rows in ([0, 1], [2, 3], [1, 0], [2, 3]):
                want, found = loss(plain, rows), loss(graphed, rows)
                assert found.item() == pytest.approx(want.item(), rel=1e-5)
                wanted = torch.autograd.grad(want, parameters)
                for ours, theirs in zip(
                    torch.autograd.grad(found, parameters), wanted, strict=True
                ):
                    assert difference(ours, theirs) < 1e-5 + 1e-4 * theirs.abs().max()
            assert 1 <= len(graphed.graphs) <= 3  # and they were captured


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_replay_has_the_losses_and_gradients_of_eager(tiny_folder):
    """In a process of its own, for this one sees no GPU."""
    call = f"import test_graphs; test_graphs.replays_on_a_gpu({str(tiny_folder)!r})"
    env = SEES_GPU | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    subprocess.run([sys.executable, "-c", call], env=env, check=True, timeout=300)
