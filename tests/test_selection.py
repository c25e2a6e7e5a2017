"""Ways of choosing heads: what each scores, and that the script takes each."""

import json

import pytest
import torch
from conftest import difference

import select_heads
import train
from lofit.compare import selection
from lofit.errors import InputError
from lofit.heads import attach_offsets, edits_off
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, mean_loss
from lofit.run.setup import open_runs
from lofit.tasks import Example

TEXTS = [("Q: What is the capital of Braviland? A:", "Brasaville"), ("Q: Who is Simon? A:", "Ann")]


@pytest.fixture
def flags(flags, tmp_path):
    return [*flags, "--run", str(tmp_path / "run")]


@pytest.fixture
def score(flags):
    """score(way, seed): the scores of all heads by a way, on two examples."""

    def by(way, seed=0):
        args = select_heads.parse_args([*flags, "--seed", str(seed)])
        with open_runs(args, "select_heads") as runs:
            return selection.SCORERS[way](next(runs), [Example(*text) for text in TEXTS])

    return by


@pytest.mark.parametrize("way", selection.SCORERS)
def test_every_way_scores_every_head_and_the_same_seed_the_same(score, way):
    one, two = score(way, seed=3), score(way, seed=3)
    assert one.shape == (3, 4) and one.isfinite().all() and (one >= 0).all()
    assert torch.equal(one, two)
    assert way != "random" or not torch.equal(one, score(way, seed=4))


def test_gradient_is_that_of_the_mean_loss_in_units_of_sigma(score, tiny, tiny_folder):
    scores = score("gradient")
    objective = CrossEntropy(tiny, load_tokenizer(tiny_folder), TEXTS)
    with edits_off(tiny):
        sigma, step = selection.head_sigma(tiny, [ids for ids, _ in objective.texts]), 1e-2
    for head in ((0, 1), (2, 3)):
        slopes = []
        for unit in torch.eye(8):
            losses = []
            for sign in (1, -1):
                attach_offsets(tiny, [head], sign * step * unit[None])
                losses.append(mean_loss(objective, 2))
            slopes.append((losses[0] - losses[1]) / (2 * step))
        expected = sigma[head] * torch.tensor(slopes).norm()
        assert scores[head].item() == pytest.approx(expected.item(), rel=1e-2)


def test_sigma_is_the_standard_deviation_of_z(tiny):
    """By hand, from the z of each text alone; the slots are left as they were."""
    texts, seen = [[1, 5, 6, 7, 8], [1, 9, 10]], [[], [], []]
    layers = [layer.self_attn for layer in tiny.model.layers]
    for layer, z in zip(layers, seen, strict=True):
        layer.o_proj.register_forward_pre_hook(lambda _, args, z=z: z.append(args[0][0]))
    for text in texts:
        tiny(torch.tensor([text]))
    per_layer = [torch.cat(z).unflatten(-1, (4, 8)) for z in seen]
    want = torch.stack([z.var(0, correction=0).mean(-1).sqrt() for z in per_layer])
    sigma = selection.head_sigma(tiny, texts)
    assert sigma.shape == (3, 4) and difference(sigma, want) < 1e-5
    assert not any(layer.head_out._forward_pre_hooks for layer in layers)


def test_probes_find_the_head_that_knows(score, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(80, 3, 4, 8, generator=generator)
    z[:, 1, 2, 5] += torch.tensor([6.0, -6.0]).repeat(40)
    monkeypatch.setattr(selection, "last_z", lambda model, texts: z)
    monkeypatch.setattr(selection, "contrast", lambda run, examples: [[1], [2]] * 40)
    scores = score("probe")
    assert scores[1, 2] == 1
    scores[1, 2] = 0.5
    assert 0.3 < scores.min() and scores.max() < 0.7  # by cross-validation noise is noise


def test_both_texts_of_a_pair_are_on_the_same_side():
    """Alike, one of them is told and the other is not; if a probe were trained on one of them, it
    would take the other for that one and be wrong."""
    z = torch.randn(20, 2, 2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        selection.probe_accuracy(z.repeat_interleave(2, 0), seed=1), torch.full((2, 2), 0.5)
    )


def test_a_probe_is_not_held_back_from_what_it_can_see():
    """With a penalty far above scikit-learn's it would always answer the more frequent."""
    right = torch.tensor([1.0] * 30 + [0.0] * 10)
    z = (2 * right - 1)[:, None, None].expand(40, 3, 4)
    assert selection.hits_of_probes(z, right, z, right).all()


def test_last_z_is_what_reaches_o_proj_at_the_last_token(tiny):
    texts, seen = [[5, 6, 7], [8, 9]], []
    layer = tiny.model.layers[1].self_attn
    hook = layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = selection.last_z(tiny, texts)
    hook.remove()
    assert found.shape == (2, 3, 4, 8)
    for i in range(2):
        assert torch.equal(found[i, 1].flatten(), seen[i][0, -1])
    assert not layer.head_out._forward_pre_hooks


@pytest.mark.parametrize("way", selection.SCORERS)
def test_the_script_takes_a_way_and_says_so(flags, tmp_path, way):
    select_heads.main([*flags, "--by", way, "--heads", "2", "--task", "clutrr"])
    found = json.loads((tmp_path / "run" / "heads.json").read_text())
    assert found["settings"]["by"] == way and len(found["heads"]) == 2
    assert "lr" not in found["settings"]


def test_a_probe_has_an_example_to_be_asked_about(flags, tmp_path):
    with pytest.raises(InputError, match="--by probe: takes 2 examples or more"):
        select_heads.main([*flags, "--by", "probe", "--heads", "2", "--n-train", "1"])
    assert not (tmp_path / "run" / "heads.json").exists()


@pytest.mark.slow
def test_probes_take_the_answers_of_truthfulqa(flags, tmp_path):
    task = ["--task", "truthfulqa-0"]
    select_heads.main([*flags, *task, "--by", "probe", "--heads", "2"])
    assert len(json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]) == 2


def test_fewer_examples_are_the_first_of_more(flags, capsys):
    train.main([*flags, "--heads", "all", "--epochs", "1", "--n-train", "5"])
    assert "on 5 examples" in capsys.readouterr().out
    for script in (train, select_heads):
        with pytest.raises(InputError, match="--n-train 25: .*train.jsonl has 24 examples"):
            script.main(
                [*flags, "--n-train", "25", "--heads", "2" if script is not train else "all"]
            )
    with open_runs(train.parse_args(flags), "train") as runs:
        run = next(runs)
        few, more = run.read("train", 3), run.read("train", 9)
    assert more[:3] == few and len({e.prompt for e in more}) == 9
    assert run.info["settings"]["n_train"] == 9
