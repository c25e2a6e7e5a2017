"""A model whose weights are split over processes does what a whole one does."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import difference, end_group, random_model, start_group
from test_parallel import alone, assert_same, calls

from lofit.distributed import Sharded, join
from lofit.heads import attach_offsets, attach_scales, random_init
from lofit.llm.batches import collate
from lofit.llm.checkpoint import load_model
from lofit.llm.config import ModelConfig
from lofit.llm.generate import generate
from lofit.llm.save import save_model
from lofit.llm.scoring import target_losses

# 2 processes divide none of these but the heads
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=31, intermediate_size=45, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    rms_norm_eps=1e-5, eos_token_id=(2,),
)  # fmt: skip
KINDS = {"untied": CONFIG, "tied": replace(CONFIG, tie_word_embeddings=True)}


def gradients(model, batch) -> torch.Tensor:
    edits = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(target_losses(model, batch).mean(), edits)
    return torch.cat([g.flatten() for g in found])


def examine(one, split) -> dict:
    """Differences between a whole model and a split one in all that is done with them."""
    from torch.distributed.tensor import DTensor

    parts = [p for p in split.parameters() if isinstance(p, DTensor)]
    whole = [p.numel() for p in one.model.layers.parameters()]
    found = {"share": sum(p.to_local().numel() for p in parts) / sum(whole)}
    found["same base"] = one.source.fingerprint == split.source.fingerprint
    ids = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([(row, [-100] * 4 + row[4:]) for row in ids], "cpu")
    for model in (one, split):
        attach_scales(model, random_init(model, 12, 0).view(3, 4, 8))
    found["scales"] = difference(gradients(split, batch), gradients(one, batch))
    with torch.no_grad():
        found["losses"] = difference(target_losses(split, batch), target_losses(one, batch))
    for model in (one, split):
        attach_offsets(model, [(1, 2), (2, 0)], torch.full((2, 8), 0.1))
    found["offsets"] = difference(gradients(split, batch), gradients(one, batch))
    found["greedy"] = generate(split, ids, 4, ()) == generate(one, ids, 4, ())
    return found


def main(folders: list[str]) -> None:
    """One process of those that the test looks at."""
    join("cpu")
    for folder in folders:
        split = load_model(folder, way=Sharded)
        sys.__stdout__.write(json.dumps(examine(load_model(folder), split)) + "\n")


@pytest.mark.slow
def test_a_split_model_computes_what_a_whole_one_does(tmp_path):
    for kind, config in KINDS.items():
        save_model(random_model(config), tmp_path / kind, torch.float32)
    folders = [str(tmp_path / kind) for kind in KINDS]
    for code, out, error in end_group(start_group(2, ("test_sharded", folders)), 120):
        assert code == 0, error
        for found in map(json.loads, out.splitlines()):
            assert found["greedy"] and found["same base"]
            assert 0.45 < found["share"] < 0.55
            for what in ("scales", "losses", "offsets"):
                assert found[what] <= 1e-6, what


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_split_model_and_a_whole_one_go_the_same_way(flags, tmp_path, tied):
    """Through the scripts: exact match, in parts (the 5 rows of a batch are 3 and 2 of the two
    processes, which must go through the layers equally often); with a tied embedding DPO and
    choices."""
    if tied:
        folder = Path(flags[1])
        config = ModelConfig.from_file(folder / "config.json")
        save_model(random_model(replace(config, tie_word_embeddings=True)), folder, torch.float32)
    run = "truthfulqa" if tied else "mquake"
    one, two = (
        [
            (name, argv if tied or name == "eval" else [*argv, "--accumulate", "3"])
            for name, argv in calls([*flags, *extra], tmp_path / folder, [run])
        ]
        for folder, extra in (("one", []), ("group", ["--shard"]))
    )
    group = start_group(2, *two)
    alone(one)
    ended = end_group(group)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same(tmp_path / "one" / run, tmp_path / "group" / run)
