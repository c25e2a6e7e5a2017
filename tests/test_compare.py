"""The methods that LoFiT is compared with: their equations, their files, peft's LoRA."""

import json

import pytest
import torch
from conftest import difference, random_model, slow_but
from lofit.compare.edits import attach, gather
from lofit.compare.stored import KINDS
from lofit.run.artefacts import load_offsets, read_offsets
from lofit.run.session import Session
from peers import hf_batch, hf_twin

import eval as evaluate
import train
from lofit.compare import bias, iti, lora, post_block, red, repe
from lofit.compare import methods as baselines
from lofit.compare.selection import contrast, last_z
from lofit.errors import InputError
from lofit.heads import attach_offsets, edits_off, init_offsets
from lofit.llm.batches import IGNORE, collate
from lofit.llm.checkpoint import load_model
from lofit.llm.scoring import target_losses
from lofit.run.arguments import METHODS
from lofit.training import Schedule, optimizer_for, train_step

INIT = {name: baselines.START[name] for name in ("lora", "red", "bias", "post_block")}
IDS = torch.tensor([[1, 5, 9, 20, 33, 4, 7]])


def noisy(tensors):
    generator = torch.Generator().manual_seed(3)
    return {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}


@pytest.mark.parametrize("name", INIT)
def test_untrained_it_changes_nothing_and_trained_it_is_off_where_edits_are(tiny_config, name):
    model = random_model(tiny_config)
    base = model(IDS)
    start = INIT[name](tiny_config, 0)
    parameters = attach(model, KINDS[name], start)
    assert difference(model(IDS), base) < 1e-6
    assert sum(p.numel() for p in parameters) == sum(t.numel() for t in start.values())
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in parameters)
    attach(model, KINDS[name], noisy(start))
    assert difference(model(IDS), base) > 1e-3
    with edits_off(model):
        assert difference(model(IDS), base) == 0
    attach_offsets(model, [(0, 0)], torch.zeros(1, tiny_config.head_dim))
    assert difference(model(IDS), base) == 0


def test_gather_is_the_inverse_of_attach(tiny_config):
    model = random_model(tiny_config)
    for name, init in INIT.items():
        tensors = noisy(init(tiny_config, 0))
        attach(model, KINDS[name], tensors)
        found = gather(model)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_red_and_bias_are_their_equations(tiny_config):
    model, D = random_model(tiny_config), tiny_config.hidden_size
    layer = model.model.layers[1]
    x, z = torch.randn(2, 3, D), torch.randn(2, 3, 4, 8)
    mlp, o_proj = layer.mlp(x), layer.self_attn.o_proj(z.flatten(-2))
    tensors = noisy(red.init(tiny_config, 0))
    attach(model, red.RED, tensors)
    expected = tensors["layers.1.scale"] * mlp + tensors["layers.1.bias"]
    assert difference(layer.mlp(x), expected) < 1e-6
    tensors = noisy(bias.init(tiny_config, 0))
    attach(model, bias.Bias, tensors)
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
    attach(model, KINDS["post_block"], {"layers.0.shift": vector})
    model(IDS)
    assert torch.equal(seen[0], before[0])
    assert difference(seen[1], before[1] + vector) < 1e-6


def test_fewer_layers_are_spread_evenly(tiny_config):
    assert post_block.spread(30, 3) == [5, 15, 25] and post_block.spread(18, 3) == [3, 9, 15]
    assert post_block.spread(4, 4) == [0, 1, 2, 3] and post_block.spread(5, 1) == [2]
    found = post_block.init(tiny_config, 0, [1])
    assert list(found) == ["layers.1.shift"] and not found["layers.1.shift"].any()


def test_loss_of_lora_over_ten_steps_is_that_of_peft(tiny_config):
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    model = random_model(tiny_config).requires_grad_(False)
    twin = peft.get_peft_model(
        hf_twin(model), peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    start = lora.init(tiny_config, 0)
    theirs = []
    for name, p in twin.named_parameters():
        if p.requires_grad:
            _, _, layer = name.partition("layers.")
            index, _, module, part, *_ = layer.split(".")
            p.data.copy_(start[f"layers.{index}.{module}_{part.removeprefix('lora_')}"])
            theirs.append(p)
    ours = attach(model, lora.LoRA, start)
    texts = [([1, 5, 9, 20, 33, 4], [IGNORE] * 3 + [20, 33, 4]), ([1, 8, 3], [IGNORE, 8, 3])]
    schedule, batch = Schedule(lr=1e-2, epochs=1), hf_batch(texts, "cpu")
    one, two = optimizer_for(ours, 1e-2), optimizer_for(theirs, 1e-2)
    first = None
    for step in range(10):
        loss = target_losses(model, collate(texts, "cpu")).mean()
        other = twin(**batch).loss
        first = first or loss.item()
        assert abs(loss.item() - other.item()) <= 1e-5
        train_step(one, ours, loss, schedule, step, 10)
        train_step(two, theirs, other, schedule, step, 10)
    assert loss.item() < first - 0.1


def test_repe_points_to_the_right_answers_and_shifts_by_alpha_sigma():
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(2, 16, generator=generator), dim=-1)
    hidden = 0.1 * torch.randn(40, 2, 16, generator=generator)
    hidden[0::2] += 3 * true
    vectors = repe.reading_vectors(hidden, alpha=2.0)
    for layer in range(2):
        along = torch.nn.functional.cosine_similarity(vectors[layer], true[layer], dim=0)
        assert along > 0.99
        sigma = (hidden[:, layer] @ (vectors[layer] / vectors[layer].norm())).std()
        assert vectors[layer].norm() == pytest.approx(2 * sigma.item(), rel=1e-4)


def test_iti_is_honest_llamas_formula_on_recorded_activations():
    """Its get_com_directions and get_interventions_dict, in numpy, head by head."""
    z = torch.randn(12, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    heads = [(2, 1), (0, 3)]
    found = iti.mass_mean_shift(z, heads, alpha=15.0)
    for row, (layer, head) in zip(found, heads, strict=True):
        activations = z[:, layer, head].numpy()
        direction = activations[0::2].mean(axis=0) - activations[1::2].mean(axis=0)
        direction = direction / (direction**2).sum() ** 0.5
        spread = (activations @ direction.T).std()
        assert difference(row, torch.from_numpy(15.0 * spread * direction)) < 1e-5


def test_iti_moves_heads_from_wrong_answers_to_right_ones(tiny_folder, small_data, tmp_path):
    """Its command: the shifts are those of z at the ends of right and wrong answers, in turns."""
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--dtype", "float32"]
    run = ["--method", "iti", "--top", "2", "--alpha", "3", "--run", str(tmp_path)]
    train.main([*flags, *run])
    heads, offsets, _ = read_offsets(tmp_path / "offsets.safetensors")
    session = Session(train.parse_args([*flags, "--run", str(tmp_path / "other")]), "train")
    next(session.folds())
    z = last_z(session.model, contrast(session, session.read("train")))
    assert difference(offsets, iti.mass_mean_shift(z, heads, 3.0)) < 1e-6


@pytest.mark.parametrize("method", slow_but(["lora"], [m for m in METHODS if m != "lofit"]))
def test_train_and_eval_take_it_like_lofit(method, tiny_folder, small_data, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run)]
    trained = ["--epochs", "3", "--lr", "0.05"] if method in baselines.LR else ["--alpha", "5"]
    top = ["--top", "2"] if method == "iti" else []
    train.main([*flags, "--method", method, *top, *trained])
    evaluate.main(flags)
    results = json.loads((run / "results.json").read_text())
    info = json.loads((run / "lofit_config.json").read_text())
    assert results["trained_values"] > 0 and results["offsets_hash"]
    assert results["settings"]["method"] == method and set(info["val"]) == set(results["base"])
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    assert any(r["tuned"]["prediction"] != r["base"]["prediction"] for r in lines)
    if method == "iti":
        assert len(results["heads"]) == 2
        return
    assert f"{method}, {results['trained_values']:,} trained values" in capsys.readouterr().out
    model = load_model(tiny_folder)
    heads, read = load_offsets(run / "offsets.safetensors", model)
    assert heads == [] and read["trained_values"] == sum(t.numel() for t in gather(model).values())


def test_peft_reads_the_lora_that_we_trained(tiny_folder, small_data, tmp_path):
    peft = pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    run = tmp_path / "run"
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run)]
    train.main([*flags, "--method", "lora", "--epochs", "2", "--lr", "0.05"])
    model = load_model(tiny_folder)
    base = model(IDS)
    load_offsets(run / "offsets.safetensors", model)
    twin = load_model(tiny_folder)
    theirs = peft.PeftModel.from_pretrained(hf_twin(twin), str(run)).eval()
    ours = model(IDS)
    assert difference(ours, theirs(IDS).logits) < 1e-4 < difference(ours, base)


def test_files_that_do_not_fit_are_refused(tiny_config, tiny_folder, small_data, tmp_path):
    model = random_model(tiny_config)
    tensors = red.init(tiny_config, 0)
    with pytest.raises(InputError, match=r"layers.7.scale \[32\]: expected"):
        attach(model, red.RED, tensors | {"layers.7.scale": tensors["layers.0.scale"]})
    with pytest.raises(InputError, match=r"layers.0.bias \[3\]: expected"):
        attach(model, red.RED, tensors | {"layers.0.bias": torch.zeros(3)})
    with pytest.raises(InputError, match="layer 1: expected"):
        attach(model, red.RED, {k: t for k, t in tensors.items() if k != "layers.1.bias"})
    from lofit.run.adapters import open_adapter

    run = tmp_path / "run"
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(run)]
    train.main([*flags, "--method", "red", "--epochs", "1"])
    with pytest.raises(InputError, match="made by train.py --method red; expected LoFiT's"):
        open_adapter(str(run))
    assert init_offsets(model, 1, 0).shape == (1, 8)
