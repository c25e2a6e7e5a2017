"""Ways of choosing heads: what each scores, and that the script takes each."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import difference
from lofit.run.session import Session

import select_heads
import train
from lofit.compare import selection
from lofit.errors import InputError
from lofit.heads import attach_offsets, edits_off, rank_heads
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, mean_loss
from lofit.recipes import Recipe
from lofit.tasks import Example

TEXTS = [("Q: What is the capital of Braviland? A:", "Brasaville"), ("Q: Who is Simon? A:", "Ann")]


class Run:
    """What the ways to choose use of a session."""

    def __init__(self, model, tokenizer, seed):
        self.model, self.tokenizer, self.seed, self.settings = model, tokenizer, seed, {}
        self.recipe, self.wrap, self.data = Recipe(0.05, 0.0, 0.1, "10%", 2, 2, 1), str, "here"

    def setting(self, name, flag, default, origin=None):
        return default if flag is None else flag

    def read(self, split, n=None):
        return [Example(prompt, answer) for prompt, answer in TEXTS]

    def objective(self, examples, split):
        found = CrossEntropy(self.model, self.tokenizer, TEXTS, "here")
        found.hash = ""
        return found

    def recorded(self, training):
        return contextlib.nullcontext(lambda training, record: None)


@pytest.fixture
def score(tiny, tiny_folder):
    """score(way, seed, flags): the scores of all heads by a way, on two examples."""
    tokenizer = load_tokenizer(tiny_folder)

    def by(way, *flags, seed=0):
        args = select_heads.parse_args(["--by", way, *flags])
        return selection.SCORERS[way](args, Run(tiny, tokenizer, seed))

    return by


@pytest.mark.parametrize("way", selection.SCORERS)
def test_every_way_scores_every_head_and_the_same_seed_the_same(score, way):
    one, two = score(way, seed=3), score(way, seed=3)
    assert one.shape == (3, 4) and one.isfinite().all() and (one >= 0).all()
    assert torch.equal(one, two)
    assert way in ("gradient", "probe") or not torch.equal(one, score(way, seed=4))


def test_spread_takes_layers_evenly_for_every_number_of_heads(score):
    for seed in range(5):
        scores = score("spread", seed=seed)
        for k in range(1, 13):
            layers = [layer for layer, _ in rank_heads(scores, k)]
            counts = [layers.count(layer) for layer in range(3)]
            assert max(counts) - min(counts) <= 1


def test_gradient_is_that_of_the_mean_loss_in_units_of_sigma(score, tiny, tiny_folder):
    scores = score("gradient")
    objective = CrossEntropy(tiny, load_tokenizer(tiny_folder), TEXTS, "here")
    with edits_off(tiny):
        sigma, step = selection.head_sigma(tiny, objective.texts()), 1e-2
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


def test_a_gate_is_open_as_often_as_its_penalty_says():
    n = 20_000  # heads with each of three gates
    edit = selection.GatedOffset(
        torch.ones(3 * n, 2), torch.ones(3 * n), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        edit.log_alpha.copy_(torch.tensor([-2.0, 0.0, 3.0]).repeat(n))
        draws = edit.gate().view(n, 3)
    assert difference((draws > 0).float().mean(0), edit.open().detach()[:3]) < 0.015
    assert draws.min() == 0 and draws.max() == 1


def test_the_l0_penalty_closes_gates_and_none_of_it_is_in_the_offsets(score):
    flags = ("--lr", "0.3", "--epochs", "20")
    free, paid = score("gates", *flags, "--l1", "0"), score("gates", *flags, "--l1", "1")
    assert paid.mean() < 0.3 < free.mean()


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


@pytest.mark.parametrize(
    ("by", "flag"),
    [("random", "--lr"), ("spread", "--n-train"), ("gradient", "--epochs"), ("probe", "--l1"),
     ("task:clutrr", "--batch-size")],
)  # fmt: skip
def test_a_flag_that_a_way_does_not_use_is_an_error(by, flag):
    with pytest.raises(InputError, match=f"{flag}: --by {by} does not use it"):
        select_heads.main(["--by", by, flag, "1"])


@pytest.mark.parametrize(
    "flags",
    ["--heads all --top 5", "--method lora --heads random", "--method repe --lr 1", "--draw 3",
     "--alpha 2", "--method lora --top 3", "--method iti --epochs 2", "--heads all --draw 1",
     "--method repe --compile"],
)  # fmt: skip
def test_a_flag_that_training_does_not_use_is_an_error(flags):
    with pytest.raises(InputError, match="--.*: not used with .*; leave it out"):
        train.main(flags.split())


def test_compiling_where_nothing_is_trained_or_padded_is_an_error(flags, tmp_path, monkeypatch):
    """In both steps, before anything is written; a way that trains nothing says so itself."""
    with pytest.raises(InputError, match="--compile: --by probe does not use it"):
        select_heads.main([*flags, "--by", "probe", "--compile"])
    for script in (select_heads, train):
        with pytest.raises(InputError, match="--compile: not used with --plain; leave it out"):
            script.main([*flags, "--plain", "--compile"])
    monkeypatch.setattr(Session, "_pads_badly", lambda _: True)
    with pytest.raises(InputError, match="--compile: not used with a model with dynamic RoPE"):
        train.main([*flags, "--compile"])
    assert not list(tmp_path.glob("run/*.json"))


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_angles_that_follow_the_longest_row_forbid_padding(kind):
    rope = {"full_attention": {"rope_type": kind}}
    run = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(rope_parameters=rope)))
    assert Session._pads_badly(run) == (kind == "dynamic")


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


@pytest.fixture
def flags(tiny_folder, small_data, tmp_path):
    return ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("way", "task"),
    [
        ("gradient", "clutrr"),
        ("probe", "clutrr"),
        pytest.param("probe", "truthfulqa", marks=pytest.mark.slow),
        ("gates", "mquake"),
    ],
)
def test_the_script_takes_a_way_and_says_so(flags, tmp_path, way, task):
    fold = ["--fold", "0"] if task == "truthfulqa" else []
    select_heads.main([*flags, "--by", way, "--heads", "2", "--task", task, *fold])
    folder = tmp_path / "run" / ("fold0" if task == "truthfulqa" else "")
    found = json.loads((folder / "heads.json").read_text())
    assert found["settings"]["by"] == way and len(found["heads"]) == 2
    assert ("lr" in found["settings"]) == (way == "gates")


def test_heads_of_another_task(flags, tmp_path):
    one, two = [*flags[:-1], str(tmp_path / "mquake")], [*flags[:-1], str(tmp_path / "clutrr")]
    select_heads.main([*one, "--by", "spread", "--heads", "2"])
    first = json.loads((tmp_path / "mquake" / "heads.json").read_text())
    assert "scales" not in json.dumps(first)
    for other in ("mquake", str(tmp_path / "mquake")):
        select_heads.main([*two, "--task", "clutrr", "--by", f"task:{other}", "--heads", "3"])
        found = json.loads((tmp_path / "clutrr" / "heads.json").read_text())
        assert found["scores"] == first["scores"] and found["heads"][:2] == first["heads"]
        assert found["task"] == "clutrr" and found["settings"]["by"] == f"task:{other}"
    with pytest.raises(InputError, match="task:own: .*no such file; run select_heads.py"):
        select_heads.main([*two, "--by", "task:own"])
    with pytest.raises(InputError, match="--by luck: expected scales, gradient"):
        select_heads.main([*two, "--by", "luck"])


def test_draws_of_random_heads_under_one_seed(flags, tmp_path):
    def heads(*extra):
        train.main([*flags, "--heads", "random", "--top", "4", "--epochs", "1", *extra])
        return json.loads((tmp_path / "run" / "lofit_config.json").read_text())

    usual, drawn = heads(), heads("--draw", "7")
    assert "draw" not in usual["settings"] and drawn["settings"]["draw"] == 7
    assert usual["heads"] == heads("--draw", "42")["heads"] != drawn["heads"]
    assert drawn["heads"] == heads("--seed", "1", "--draw", "7")["heads"]


def test_fewer_examples_are_the_first_of_more(flags, tmp_path, tiny_folder, capsys):
    train.main([*flags, "--heads", "all", "--epochs", "1", "--n-train", "5"])
    assert "on 5 examples" in capsys.readouterr().out
    told = json.loads((tmp_path / "run" / "lofit_config.json").read_text())
    assert told["settings"]["n_train"] == 5
    for script in (train, select_heads):
        with pytest.raises(InputError, match="--n-train 25: .* 1 to 24 examples"):
            script.main(
                [*flags, "--n-train", "25", "--heads", "2" if script is not train else "all"]
            )
    run = train.Session(train.parse_args(flags), "train")
    next(run.folds())
    few, more = run.read("train", 3), run.read("train", 9)
    assert more[:3] == few and len({e.prompt for e in more}) == 9
