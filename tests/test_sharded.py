"""A split model does what a whole one does, and has gathered only what runs."""

import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import MINI, difference, end_group, random_model, start_group
from lofit.distributed.sharded import Shards, gathered, in_step
from test_parallel import alone, assert_same, calls, folder_of
from torch.utils._python_dispatch import TorchDispatchMode

import select_heads
from lofit.compare.selection import head_sigma
from lofit.errors import InputError
from lofit.fast.hidden_cache import HiddenCache
from lofit.heads import attach_offsets, attach_scales, attention_layers, init_scales
from lofit.inspect.memory import weight_bytes
from lofit.llm import scoring
from lofit.llm.batches import collate
from lofit.llm.checkpoint import assemble, load_model, save_model, text_name
from lofit.llm.config import ModelConfig
from lofit.llm.generate import generate
from lofit.llm.scoring import target_losses

# 2 processes divide none of these but the heads
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=31, intermediate_size=45, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    rms_norm_eps=1e-5, eos_token_id=(2,),
)  # fmt: skip
KINDS = {"untied": CONFIG, "tied": replace(CONFIG, tie_word_embeddings=True)}
ENDS = ["lm_head", "norm"]
EVERY_END = ["embed_tokens", *ENDS]


class Gathers(TorchDispatchMode):
    """Calls back at each gathering of tensors from all processes, with its bytes."""

    def __init__(self, back):
        super().__init__()
        self.back = back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in func.__name__:
            self.back(args[0].nbytes)
        return func(*args, **(kwargs or {}))


class Watch:
    """What happens to a split model: `events` has each gathering, and each part that runs with the
    parts that are whole then, and `logits` the number of their parts; `held` is bytes of what was
    gathered and is there now, `most` their peak."""

    def __init__(self, model):
        self.model, self.events, self.logits, self.seen, self.most = model, [], [], set(), 0

    def gather(self, n_bytes: int) -> None:
        """As it comes from all processes, and as it is used, beside what is whole already."""
        self.events.append("gather")
        self.most = max(self.most, self.held() + 2 * n_bytes)

    def whole(self) -> list[str]:
        found = set()
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if not hasattr(p, "placements") and "head_out" not in name:
                self.seen.add(p)
                name = name.removeprefix("model.").removesuffix(".weight")
                found.add(".".join(name.split(".")[:2]))
        return sorted(found)

    def held(self) -> int:
        return sum(p.untyped_storage().nbytes() for p in self.seen)

    @contextmanager
    def watching(self):
        def note(what):
            return lambda *_: self.events.append([what, self.whole()])

        def count(*_):
            self.logits[-1] += 1

        inner = self.model.model
        ends = {"embed": inner.embed_tokens, "norm": inner.norm}
        hooks = [part.register_forward_pre_hook(note(what)) for what, part in ends.items()]
        hooks.append(self.model.lm_head.register_forward_pre_hook(count))
        for i, attention in enumerate(attention_layers(self.model)):
            slot = attention.head_out
            hooks.append(slot.register_forward_pre_hook(note(f"layer {i}")))
            hooks.append(slot.register_full_backward_pre_hook(note(f"back in {i}")))
        self.events.clear()
        self.logits.append(0)
        with Gathers(self.gather):
            yield
        for hook in hooks:
            hook.remove()


def step(model, batch, known=()) -> torch.Tensor:
    """The gradients of a step of training, in one row."""
    edits = [p for p in model.parameters() if p.requires_grad]
    with gathered(model):
        gradients = torch.autograd.grad(target_losses(model, batch, *known).mean(), edits)
    return torch.cat([g.flatten() for g in gradients])


def examine(one, split) -> dict:
    """Differences between a whole model and a split one in all that is done with them, where the
    first process has more to do than the second; and what was gathered when."""
    first, watch = dist.get_rank() == 0, Watch(split)
    found = {"kept": sum(p.to_local().nbytes for p in split.parameters())}
    ids = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [(row, [-100] * 4 + row[4:]) for row in (ids if first else ids[:1])]
    batch = collate(texts if first else [(ids[0][:5], [-100] * 4 + ids[0][4:5])], "cpu")
    for model in (one, split):
        attach_scales(model, init_scales(model, 0))
    with watch.watching():
        found["gradients"] = difference(step(split, batch), step(one, batch))
    found["step"], found["held"] = list(watch.events), [watch.held()]
    with watch.watching(), gathered(split), torch.no_grad():
        for _ in range(2):
            split.logits(split.model(batch.ids[:1]))
    found["passes"] = list(watch.events)
    with watch.watching(), torch.no_grad():
        split(batch.ids[:1])  # as at its beginning
    found["called"] = list(watch.events)
    found["held"].append(watch.held())
    own, n = ([ids[:1], ids], 4) if first else ([ids[:2]], 2)
    with in_step(split):
        new = [generate(split, prompts, n, ()) for prompts in own]
    found["greedy"] = new == [generate(one, prompts, n, ()) for prompts in own]
    with in_step(split), torch.no_grad():
        losses = [target_losses(model, batch) for model in (one, split)] if first else []
        found["losses"] = difference(*losses) if losses else 0.0
    found["sigma"] = difference(head_sigma(one, ids), head_sigma(split, ids))  # outside of a loss
    for model in (one, split):
        attach_offsets(model, [(1, 2), (2, 0)], torch.full((2, 8), 0.1))
    with gathered(split):
        rows = list(range(batch.n_texts))
        known = [HiddenCache(model)(rows, batch) for model in (one, split)]
    found["frozen"] = difference(known[0][1], known[1][1])
    with watch.watching():
        found["offsets"] = difference(step(one, batch, known[0]), step(split, batch, known[1]))
    found["rest"] = list(watch.events)
    found["held"].append(watch.held())
    return found | {"logits": watch.logits, "most": watch.most}


def main(folders: list[str]) -> None:
    """One process of those that the tests look at."""
    scoring.MAX_LOGITS = 2 * CONFIG.vocab_size  # a loss of more than 2 tokens is of several parts
    for folder in map(Path, folders):
        config = ModelConfig.from_file(folder / "config.json")
        where = (str(folder), None, folder, config, text_name, torch.float32, "cpu")
        split = assemble(*where, Shards("cpu"))
        sys.__stdout__.write(json.dumps(examine(load_model(folder), split)) + "\n")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """kind of model -> what each of two processes found."""
    folders = [tmp_path_factory.mktemp(kind) for kind in KINDS]
    for folder, config in zip(folders, KINDS.values(), strict=True):
        save_model(random_model(config), folder, torch.float32)
    ended = end_group(start_group(2, ("test_sharded", list(map(str, folders)))), 120)
    assert [code for code, _, _ in ended] == [0, 0], ended
    each = [[json.loads(line) for line in out.splitlines()] for _, out, _ in ended]
    return dict(zip(KINDS, map(list, zip(*each, strict=True)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_model_computes_what_a_whole_one_does(found, kind):
    for process in found[kind]:
        assert process["greedy"]
        for what in ("gradients", "losses", "sigma", "frozen", "offsets"):
            assert process[what] <= 1e-6, what


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_process_keeps_its_rows_and_gathers_what_the_plan_says(found, kind):
    shapes = [p.shape for p in random_model(KINDS[kind]).parameters()]
    planned = weight_bytes(KINDS[kind], torch.float32, 2)
    for rank, process in enumerate(found[kind]):
        rows = [(-(-s[0] // 2), s[0] // 2)[rank] * (s.numel() // s[0]) for s in shapes]
        assert process["kept"] == 4 * sum(rows) <= planned["own"]
        # gathered are rows that all processes have as many of
        assert planned["gathered"] <= process["most"] <= 1.05 * planned["gathered"]


def expected(kind: str, first: int = 0, back: bool = True) -> list:
    """What a pass from layer `first` on gathers, and has whole at each part."""
    table = EVERY_END if kind == "tied" else []
    start = [] if first else ["gather", ["embed", table or ["embed_tokens"]]]
    table = [] if first else table
    forward = [["gather", [f"layer {i}", sorted([*table, f"layers.{i}"])]] for i in range(first, 3)]
    end = [*([] if table else ["gather"]), ["norm", ENDS if kind == "untied" else EVERY_END]]
    backward = [["gather", [f"back in {i}", [f"layers.{i}"]]] for i in (2, 1, 0)[: 3 - first]]
    return start + sum(forward, []) + end + (sum(backward, []) if back else [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_gathers_a_part_when_it_runs_and_lets_go_of_it(found, kind):
    """Whatever the number of logits' parts: of 15 tokens 8, and as many again in the backward
    pass; of one token 1."""
    for process, n in zip(found[kind], (16, 1), strict=True):
        assert process["step"] == expected(kind)
        assert process["rest"] == expected(kind, first=1)
        assert process["logits"][0] == n
        assert process["held"] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_pass_begins_without_lm_head(found, kind):
    again = expected(kind, back=False)
    for process in found[kind]:
        # a tied one is whole already
        assert process["passes"] == expected(kind, back=False) + again[kind == "tied" :]
        parts = [[e for e in events if e != "gather"] for events in (process["called"], again)]
        assert parts[0] == parts[1]


@pytest.mark.slow
def test_a_split_model_and_an_unsplit_one_go_the_same_way(tiny_config, small_data, tmp_path):
    """Through the scripts: exact match, and with a tied embedding DPO and choices."""
    ways = []
    for run, tied in (("mquake", False), ("truthfulqa", True)):
        folder = tmp_path / run
        save_model(
            random_model(replace(tiny_config, tie_word_embeddings=tied)), folder, torch.float32
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINI / name, folder / name)
        ways.append((["--model", str(folder), "--data", str(small_data)], run))
    split = [calls([*flags, "--shard"], tmp_path / "group", [run]) for flags, run in ways]
    group = start_group(2, *sum(split, []))
    alone(sum((calls(flags, tmp_path / "one", [run]) for flags, run in ways), []))
    ended = end_group(group)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for _, run in ways:
        assert_same(folder_of(tmp_path / "one", run), folder_of(tmp_path / "group", run))


def test_split_needs_several(tiny_folder, small_data):
    with pytest.raises(InputError, match="--shard: one process has nothing to split"):
        select_heads.main(["--model", str(tiny_folder), "--data", str(small_data), "--shard"])
