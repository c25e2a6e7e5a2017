"""Ways of choosing heads: what each scores, and that the script takes each."""

import json

import pytest
import torch
from conftest import difference

import select_heads
import train
from lofit.compare import selection as ways
from lofit.errors import InputError
from lofit.heads import attach_offsets, edits_off, head_sigma, rank_heads
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, mean_loss
from lofit.training import Schedule

TEXTS = [("Q: What is the capital of Braviland? A:", "Brasaville"), ("Q: Who is Simon? A:", "Ann")]


@pytest.fixture
def ground(tiny, tiny_folder):
    """Two examples; `ground(way=value)` changes a field."""
    tokenizer = load_tokenizer(tiny_folder)
    train_set = CrossEntropy(tiny, tokenizer, TEXTS, "here")
    pairs = [([5, 6, 7], [5, 6, 8]), ([9, 7], [9, 8])]

    def make(seed=0, penalty=1e-3, **schedule):
        schedule = Schedule(**{"lr": 0.05, "epochs": 2, "batch_size": 1} | schedule)
        return ways.Ground(
            tiny, train_set, schedule, seed, lambda record: None, penalty, lambda: pairs
        )

    return make


@pytest.mark.parametrize("way", ways.WAYS)
def test_every_way_scores_every_head_and_the_same_seed_the_same(ground, way):
    one, two = ways.WAYS[way](ground(seed=3)), ways.WAYS[way](ground(seed=3))
    assert one.shape == (3, 4) and one.isfinite().all() and (one >= 0).all()
    assert torch.equal(one, two)
    assert way in ("gradient", "probe") or not torch.equal(one, ways.WAYS[way](ground(seed=4)))


def test_spread_takes_layers_evenly_for_every_number_of_heads(ground):
    for seed in range(5):
        scores = ways.by_spread(ground(seed=seed))
        for k in range(1, 13):
            layers = [layer for layer, _ in rank_heads(scores, k)]
            counts = [layers.count(layer) for layer in range(3)]
            assert max(counts) - min(counts) <= 1


def test_gradient_is_that_of_the_mean_loss_in_units_of_sigma(ground, tiny):
    it = ground()
    scores = ways.by_gradient(it)
    with edits_off(tiny):
        sigma, step = head_sigma(tiny, it.train.texts()), 1e-2
    for head in ((0, 1), (2, 3)):
        slopes = []
        for unit in torch.eye(8):
            losses = []
            for sign in (1, -1):
                attach_offsets(tiny, [head], sign * step * unit[None])
                losses.append(mean_loss(it.train, 2))
            slopes.append((losses[0] - losses[1]) / (2 * step))
        expected = sigma[head] * torch.tensor(slopes).norm()
        assert scores[head].item() == pytest.approx(expected.item(), rel=1e-2)


def test_offsets_are_scored_in_units_of_sigma(ground, tiny):
    it = ground(lr=0.5)
    scores = ways.by_offsets(it)
    trained = [a.self_attn.head_out for a in tiny.model.layers]
    assert difference(scores, torch.stack([t.offset.norm(dim=-1) for t in trained])) < 1e-4


def test_a_gate_is_open_as_often_as_its_penalty_says():
    n = 20_000  # heads with each of three gates
    edit = ways.GatedOffset(
        torch.ones(3 * n, 2), torch.ones(3 * n), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        edit.log_alpha.copy_(torch.tensor([-2.0, 0.0, 3.0]).repeat(n))
        draws = edit.gate().view(n, 3)
    assert difference((draws > 0).float().mean(0), edit.open().detach()[:3]) < 0.015
    assert draws.min() == 0 and draws.max() == 1


def test_the_l0_penalty_closes_gates_and_none_of_it_is_in_the_offsets(ground):
    free = ways.by_gates(ground(penalty=0.0, lr=0.3, epochs=20))
    paid = ways.by_gates(ground(penalty=1.0, lr=0.3, epochs=20))
    assert paid.mean() < 0.3 < free.mean()


def test_probes_tell_the_head_that_knows(ground, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(80, 3, 4, 8, generator=generator)
    z[:, 1, 2, 5] += torch.tensor([6.0, -6.0]).repeat(40)
    monkeypatch.setattr(ways, "last_z", lambda model, texts: z)
    it = ground()
    object.__setattr__(it, "contrast", lambda: [([1], [2])] * 40)
    scores = ways.by_probe(it)
    assert scores[1, 2] == 1
    scores[1, 2] = 0.5
    assert 0.3 < scores.min() and scores.max() < 0.7  # by cross-validation noise is noise


def test_last_z_is_what_reaches_o_proj_at_the_last_token(tiny):
    texts, seen = [[5, 6, 7], [8, 9]], []
    layer = tiny.model.layers[1].self_attn
    hook = layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = ways.last_z(tiny, texts)
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
    select_heads.main([*flags, "--by", way, "--heads", "2", "--task", task, "--fold", "0"])
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
    with pytest.raises(InputError, match="--by luck: expected scales, random"):
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
    few, more = run.read("train", 3), run.read("train", 9)
    assert more[:3] == few and len({e.prompt for e in more}) == 9
