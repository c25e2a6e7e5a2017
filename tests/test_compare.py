"""The methods that LoFiT is compared with: their equations, their files, peft's LoRA."""

import json

import pytest
import torch
from conftest import difference, random_model, slow_but
from peers import hf_batch, hf_twin

import eval as evaluate
import train
from lofit.compare.baselines import (
    METHODS,
    attach_edits,
    attach_method,
    mass_mean_shift,
    reading_vectors,
)
from lofit.compare.selection import contrast, last_z
from lofit.errors import InputError
from lofit.heads import attach_offsets, edits_off
from lofit.llm.batches import IGNORE, collate
from lofit.llm.checkpoint import load_model
from lofit.llm.scoring import target_losses
from lofit.run import arguments
from lofit.run.files import edit_tensors, load_offsets
from lofit.run.setup import open_runs
from lofit.training import Schedule, make_optimizer, train_step

TRAINED = [name for name, method in METHODS.items() if method.edit and not method.compute]
IDS = torch.tensor([[1, 5, 9, 20, 33, 4, 7]])


def start_of(name, config):
    """A method's tensors of all layers, as training begins."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{layer}.{part}": tensor
        for layer in range(config.num_hidden_layers)
        for part, tensor in METHODS[name].edit.start(config, generator).items()
    }


def noisy(tensors):
    generator = torch.Generator().manual_seed(3)
    return {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}


def test_the_scripts_know_every_method():
    assert arguments.METHODS == ("lofit", *METHODS)


@pytest.mark.parametrize("name", TRAINED)
def test_untrained_it_changes_nothing_and_trained_it_is_off_where_edits_are(tiny_config, name):
    """And what is read back from the model is what was attached."""
    model = random_model(tiny_config)
    base = model(IDS)
    start = start_of(name, tiny_config)
    parameters = attach_edits(model, name, start)
    assert difference(model(IDS), base) < 1e-6
    assert sum(p.numel() for p in parameters) == sum(t.numel() for t in start.values())
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in parameters)
    tensors = noisy(start)
    attach_edits(model, name, tensors)
    found = edit_tensors(model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert difference(model(IDS), base) > 1e-3
    with edits_off(model):
        assert difference(model(IDS), base) == 0
    attach_offsets(model, [(0, 0)], torch.zeros(1, tiny_config.head_dim))
    assert difference(model(IDS), base) == 0


def test_red_and_bias_are_their_equations(tiny_config):
    model, D = random_model(tiny_config), tiny_config.hidden_size
    layer = model.model.layers[1]
    x, z = torch.randn(2, 3, D), torch.randn(2, 3, 4, 8)
    mlp, o_proj = layer.mlp(x), layer.self_attn.o_proj(z.flatten(-2))
    tensors = noisy(start_of("red", tiny_config))
    attach_edits(model, "red", tensors)
    expected = tensors["layers.1.scale"] * mlp + tensors["layers.1.bias"]
    assert difference(layer.mlp(x), expected) < 1e-6
    tensors = noisy(start_of("bias", tiny_config))
    attach_edits(model, "bias", tensors)
    expected = o_proj + tensors["layers.1.bias"]
    assert difference(layer.self_attn.o_proj(z.flatten(-2)), expected) < 1e-6
    assert difference(layer.mlp(x), mlp) == 0  # RED left with the attaching of another


def test_a_post_block_vector_is_added_to_what_the_layer_hands_on(tiny_config):
    model, seen = random_model(tiny_config), {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0]}))
    model(IDS)
    before, vector = dict(seen), torch.randn(tiny_config.hidden_size)
    seen.clear()
    attach_edits(model, "post_block", {"layers.0.shift": vector})
    model(IDS)
    assert torch.equal(seen[0], before[0])
    assert difference(seen[1], before[1] + vector) < 1e-6


@pytest.mark.parametrize(("top", "layers"), [("1", [1]), ("2", [0, 2]), ("3", [0, 1, 2])])
def test_fewer_layers_are_spread_evenly(flags, top, layers):
    with open_runs(train.parse_args(flags), "train") as runs:
        run = next(runs)
        attach_method(run, "post_block", [], None, top)
    assert run.info["settings"]["layers"] == layers
    assert list(edit_tensors(run.model)) == [f"layers.{layer}.shift" for layer in layers]


def test_loss_of_lora_over_ten_steps_is_that_of_peft(tiny_config):
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    model = random_model(tiny_config).requires_grad_(False)
    twin = peft.get_peft_model(
        hf_twin(model), peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    start = start_of("lora", tiny_config)
    theirs = []
    for name, p in twin.named_parameters():
        if p.requires_grad:
            _, _, layer = name.partition("layers.")
            index, _, module, part, *_ = layer.split(".")
            p.data.copy_(start[f"layers.{index}.{module}_{part.removeprefix('lora_')}"])
            theirs.append(p)
    ours = attach_edits(model, "lora", start)
    texts = [([1, 5, 9, 20, 33, 4], [IGNORE] * 3 + [20, 33, 4]), ([1, 8, 3], [IGNORE, 8, 3])]
    schedule, batch = Schedule(lr=1e-2, epochs=1), hf_batch(texts, "cpu")
    one, two = make_optimizer(ours, schedule), make_optimizer(theirs, schedule)
    first = None
    for step in range(10):
        loss = target_losses(model, collate(texts, "cpu")).mean()
        other = twin(**batch).loss
        first = first or loss.item()
        assert abs(loss.item() - other.item()) <= 1e-5
        train_step(one, loss, schedule, step, 10)
        train_step(two, other, schedule, step, 10)
    assert loss.item() < first - 0.1


def test_repe_points_to_the_right_answers_and_shifts_by_alpha_sigma():
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(2, 16, generator=generator), dim=-1)
    hidden = 0.1 * torch.randn(40, 2, 16, generator=generator)
    hidden[0::2] += 3 * true
    vectors = reading_vectors(hidden, alpha=2.0)
    for layer in range(2):
        along = torch.nn.functional.cosine_similarity(vectors[layer], true[layer], dim=0)
        assert along > 0.99
        sigma = (hidden[:, layer] @ (vectors[layer] / vectors[layer].norm())).std()
        assert vectors[layer].norm() == pytest.approx(2 * sigma.item(), rel=1e-4)


def test_iti_is_honest_llamas_formula_on_recorded_activations():
    """Its get_com_directions and get_interventions_dict, in numpy, head by head."""
    z = torch.randn(12, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    heads = [(2, 1), (0, 3)]
    found = mass_mean_shift(z, heads, alpha=15.0)
    for row, (layer, head) in zip(found, heads, strict=True):
        activations = z[:, layer, head].numpy()
        direction = activations[0::2].mean(axis=0) - activations[1::2].mean(axis=0)
        direction = direction / (direction**2).sum() ** 0.5
        spread = (activations @ direction.T).std()
        assert difference(row, torch.from_numpy(15.0 * spread * direction)) < 1e-5


@pytest.fixture
def flags(flags, tmp_path):
    return [*flags, "--run", str(tmp_path / "run"), "--dtype", "float32"]


def test_iti_moves_heads_from_wrong_answers_to_right_ones(flags, tmp_path):
    """Its command: the shifts are those of z at the ends of right and wrong answers, in turns."""
    train.main([*flags, "--method", "iti", "--top", "2", "--strength", "3"])
    with open_runs(train.parse_args([*flags, "--run", str(tmp_path / "other")]), "train") as runs:
        run = next(runs)
        z = last_z(run.model, contrast(run, run.read("train")))
    load_offsets(tmp_path / "run", run.model)
    found = edit_tensors(run.model)
    heads = [tuple(head) for head in found["heads"].tolist()]
    assert difference(found["offsets"], mass_mean_shift(z, heads, 3.0)) < 1e-6


@pytest.mark.parametrize("method", slow_but(["lora"], METHODS))
def test_train_and_eval_take_it_like_lofit(method, flags, tiny_folder, tmp_path, capsys):
    run = tmp_path / "run"
    learns = METHODS[method].compute is None
    extra = ["--epochs", "3", "--lr", "0.05"] if learns else ["--strength", "5"]
    train.main([*flags, "--method", method, *(["--top", "2"] if method == "iti" else []), *extra])
    evaluate.main(flags)
    results = json.loads((run / "results.json").read_text())
    about, model = results["adapters"]["tuned"], load_model(tiny_folder)
    assert about["settings"]["method"] == method and about["offsets_hash"]
    info = load_offsets(run, model)
    assert set(info["val"]) == {"loss", *results["scores"]["base"]}
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert any(r["tuned"]["prediction"] != r["base"]["prediction"] for r in lines)
    n = sum(t.numel() for name, t in edit_tensors(model).items() if name != "heads")
    assert about["trained_values"] == info["trained_values"] == n
    assert len(about["heads"]) == (2 if method == "iti" else 0)
    said = "2 heads" if method == "iti" else method
    assert f"{said}, {n:,} trained values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "layer"),
    [
        ({"layers.7.scale": torch.zeros(32), "layers.7.bias": torch.zeros(32)}, "7"),
        ({"layers.0.bias": torch.zeros(3)}, "0"),
        ({"layers.0.shift": torch.zeros(32)}, "0"),
        ({"heads": torch.zeros(32)}, "heads"),
        ({"layers.1.bias": None}, "1"),
    ],
)
def test_edits_that_do_not_fit_are_refused(tiny_config, changed, layer):
    tensors = {k: t for k, t in (start_of("red", tiny_config) | changed).items() if t is not None}
    message = (
        rf"layer {layer}: .* red has scale \[32\], bias \[32\] in some of this model's 3 layers"
    )
    with pytest.raises(InputError, match=message):
        attach_edits(random_model(tiny_config), "red", tensors)
