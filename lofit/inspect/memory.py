"""The memory that a run will take, computed from config.json alone: no weights are read.

python -m lofit.inspect.memory --model meta-llama/Llama-3.1-70B --gpus 8 --memory 80

A training step (selection, which edits every layer) and an evaluation's prompts are run on tensors
without values, and what is alive at the same time is counted. Bytes of one process; what its
libraries take beside them (a CUDA context, about 0.5 GB) is not in them.
"""

import argparse
import math
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lofit import errors
from lofit.heads import attach_scales
from lofit.llm.batches import collate
from lofit.llm.checkpoint import DTYPES, find_folder
from lofit.llm.config import ModelConfig
from lofit.llm.context import KVCache
from lofit.llm.generate import prefill
from lofit.llm.model import CausalLM
from lofit.llm.scoring import target_losses
from lofit.run.arguments import int_at_least

GB = 10**9
GATHERED = 2  # times the bytes of what is gathered: as it comes from all, and as it is used


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and not yet gone, beside the model's own;
    `peak` is the most."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(p.untyped_storage() for p in model.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, n: int) -> None:
        self.now -= n


def empty_model(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """A frozen model; without values, for it is made inside a FakeTensorMode or on meta."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return CausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def training_bytes(config: ModelConfig, dtype: torch.dtype, batch: int, length: int, new: int):
    """At the peak of a step of selection on `batch` texts of which `new` tokens are the answer."""
    with FakeTensorMode():
        model = empty_model(config, dtype)
        scales = torch.zeros(config.num_hidden_layers, config.num_attention_heads, config.head_dim)
        parameters = attach_scales(model, scales)
        labels = [-100] * (length - new) + [1] * new
        texts = collate([([1] * length, labels)] * batch, "cpu")
        with Alive(model) as alive:
            target_losses(model, texts).mean().backward()
        return alive.peak + 3 * sum(p.nbytes for p in parameters)  # they, and AdamW's two of each


def evaluation_bytes(config: ModelConfig, dtype: torch.dtype, batch: int, length: int, new: int):
    """(key-value cache, all at the peak) of an evaluation's batch."""
    with FakeTensorMode():
        model = empty_model(config, dtype)
        with Alive(model) as alive:
            cache = KVCache(config, batch, length + new, model.lm_head.weight)
            n = cache.k.nbytes + cache.v.nbytes
            ids = torch.ones(batch, length, dtype=torch.int64)
            prefill(model, ids, torch.full((batch,), length), cache)
        return n, alive.peak


def weight_bytes(config: ModelConfig, dtype: torch.dtype, n: int) -> dict[str, int]:
    """All weights; with --shard on n processes the rows of one, and the most that it gathers beside
    them: a layer, the embedding, or lm_head with the last norm, one at a time (see sharded.py). A
    tied embedding stays gathered beside the layers."""
    with torch.device("meta"):
        model = empty_model(config, dtype)
    parameters = dict(model.named_parameters())
    own = sum(p.nbytes // p.shape[0] * math.ceil(p.shape[0] / n) for p in parameters.values())
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    ends = model.lm_head.weight.nbytes + model.model.norm.weight.nbytes
    tied = config.tie_word_embeddings
    gathered = max(GATHERED * ends, GATHERED * block + (ends if tied else 0))
    return {"all": sum(p.nbytes for p in parameters.values()), "own": own, "gathered": gathered}


def memory_plan(config: ModelConfig, args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """part -> bytes of a process without and with --shard."""
    dtype, n = DTYPES[args.dtype], args.gpus
    weights = weight_bytes(config, dtype, n)
    rows = math.ceil(args.batch_size / n)
    step = training_bytes(config, dtype, rows, args.length, args.new)
    cache, asked = evaluation_bytes(config, dtype, args.eval_batch, args.length, args.new)
    kept = args.examples * args.length * config.hidden_size * dtype.itemsize
    parts = {
        "weights": (weights["all"], weights["own"]),
        "gathered at once": (0, weights["gathered"]),
        "training step": (step, step),
        "evaluation's cache": (cache, cache),
        "its activations": (asked - cache, asked - cache),
    }
    for name, used in (("training", step), ("evaluation", asked)):
        parts[f"all in {name}"] = (
            weights["all"] + used, weights["own"] + weights["gathered"] + used,
        )  # fmt: skip
    return parts | {"kept states (RAM)": (kept, kept)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--model", default="weights/mini-llama", help="a folder with config.json, or a hub id")
    arg("--revision", help="branch, tag or commit of a hub id")
    arg("--gpus", type=int_at_least(1), default=1, help="processes, each with a GPU")
    arg("--memory", type=int_at_least(1), default=80, help="GB (10^9 bytes) of each")
    arg("--dtype", default="bfloat16", choices=DTYPES)
    arg(
        "--batch-size",
        type=int_at_least(1),
        default=8,
        help="of a training step, over all processes",
    )
    arg("--eval-batch", type=int_at_least(1), default=64, help="of each process")
    arg("--length", type=int_at_least(2), default=128, help="tokens of a text")
    arg("--new", type=int_at_least(1), default=16, help="tokens of an answer")
    arg("--examples", type=int_at_least(1), default=1000, help="whose hidden states are kept")
    args = parser.parse_args(argv)
    if args.new >= args.length:
        parser.error("--new: an answer is shorter than its text (--length)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = find_folder(args.model, args.revision, ("config.json",))
    config = ModelConfig.from_file(folder / "config.json")
    parts = memory_plan(config, args)
    print(
        f"{args.model}, {args.dtype}, {args.gpus} processes, batch {args.batch_size} of"
        f" {args.length} tokens; computed, not run\n\n{'GB of a process':22}{'':>10}{'--shard':>10}"
    )
    for name, sizes in parts.items():
        print(f"{name:22}" + "".join(f"{size / GB:10.3f}" for size in sizes))
    most = [max(parts["all in training"][i], parts["all in evaluation"][i]) for i in (0, 1)]
    fits = ["yes" if size <= args.memory * GB else "no" for size in most]
    print(f"{f'fits {args.memory} GB':22}" + "".join(f"{answer:>10}" for answer in fits))


if __name__ == "__main__":
    errors.run(main)
