"""Compute the memory that a run will take from config.json alone: no weights are read.

    python -m lofit.inspect.memory --model meta-llama/Llama-3.1-8B --memory 24 --task clutrr --chat
    python -m lofit.inspect.memory --model meta-llama/Llama-3.1-70B --gpus 8 --shard

With --task the texts are the longest of its data (the tokenizer is read as well); without it they
have --length tokens. A step of select_heads.py, which edits every layer, and a batch of eval.py are
run on tensors without values, and the bytes that are alive at the same time are counted. What
torch's allocator leaves unused, a few percent, is not counted.
"""

import argparse
import math
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lofit import errors
from lofit.evaluation import BATCH
from lofit.fast.hidden_cache import MAX_BYTES
from lofit.heads import attach_scales
from lofit.llm.batches import IGNORE, Encoded, collate, encode_example
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import DTYPES
from lofit.llm.config import ModelConfig
from lofit.llm.generate import prefill
from lofit.llm.hub import find_folder
from lofit.llm.model import CausalLM, KVCache
from lofit.llm.scoring import target_losses
from lofit.llm.tokenizer import load_tokenizer
from lofit.llm.tree import pack
from lofit.run.arguments import common_parser, natural
from lofit.tasks import find_tasks

GB = 10**9
GATHERED = 2  # times the bytes of a layer: as it comes from all processes, and as it is used
NF4 = 4.127  # bits of a weight with its share of the two scales
CONTEXT = GB // 2  # what CUDA and its libraries take in each process
ANSWER = 16  # tokens
Rows = list[list[Encoded]]  # a row of a batch is one text, or several with a common beginning


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and not yet gone, beside the model's own;
    `peak` is the most."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(p.untyped_storage() for p in model.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)):
            if storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return out

    def add(self, n: int) -> None:
        self.now += n
        self.peak = max(self.peak, self.now)


def empty_model(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """A frozen model; without values, for it is made inside a FakeTensorMode or on meta."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be cast
    try:
        return CausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def losses(model: CausalLM, rows: Rows) -> torch.Tensor:
    """The loss of each text."""
    several = any(len(row) > 1 for row in rows)
    batch = pack(rows, "cpu") if several else collate([text for (text,) in rows], "cpu")
    return target_losses(model, batch)


def training_bytes(config: ModelConfig, dtype: torch.dtype, rows: Rows) -> int:
    """The peak of a step of select_heads.py: activations, and the scales with AdamW's state."""
    with FakeTensorMode():
        model = empty_model(config, dtype)
        scales = torch.zeros(config.num_hidden_layers, config.num_attention_heads, config.head_dim)
        parameters = attach_scales(model, scales)
        with Alive(model) as alive:
            losses(model, rows).mean().backward()
        return alive.peak + 3 * sum(p.nbytes for p in parameters)  # they, and AdamW's two of each


@torch.no_grad()
def evaluation_bytes(config: ModelConfig, dtype: torch.dtype, rows: Rows, new: int) -> int:
    """The peak of a batch of eval.py, which generates `new` tokens; 0: it scores given answers."""
    with FakeTensorMode():
        model = empty_model(config, dtype)
        with Alive(model) as alive:
            if new:
                n, length = len(rows), max(map(size, rows))
                ids = torch.ones(n, length, dtype=torch.int64)
                prefill(model, ids, torch.full((n,), length), KVCache(model, n, length + new))
            else:
                losses(model, rows)
        return alive.peak


def weight_bytes(config: ModelConfig, dtype: torch.dtype, gpus: int = 1, nf4: bool = False) -> int:
    """The bytes of the weights in one process. gpus: those of --shard, with which a process keeps
    its rows of each layer and all of the rest, and gathers one layer at a time; nf4: the blocks'
    linear layers are in 4 bits, and one at a time is unpacked."""
    with torch.device("meta"):
        model = empty_model(config, dtype)
    layers = list(model.model.layers.parameters())
    rest = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in layers)
    if nf4:
        kept = sum(int(p.numel() * NF4 / 8) if p.dim() == 2 else p.nbytes for p in layers)
        return rest + kept + max(p.nbytes for p in layers)
    gathered = GATHERED * sum(p.nbytes for p in model.model.layers[0].parameters())
    own = sum(p.chunk(gpus)[0].nbytes for p in layers)
    return rest + own + (gathered if gpus > 1 else 0)


def read_rows(args: argparse.Namespace, folder: Path) -> tuple[Rows, Rows, int]:
    """The rows of training and of evaluation, the longest first, and how many tokens are generated:
    0 where answers are given."""
    if not args.task:
        ids, labels = [1] * args.length, [IGNORE] * (args.length - ANSWER) + [1] * ANSWER
        return [[(ids, labels)]] * args.batch_size, [[(ids[ANSWER:], [])]] * BATCH, ANSWER
    wrap, end = load_chat_template(folder) if args.chat else (str, None)
    tokenizer, task = load_tokenizer(folder, end), find_tasks(args.task)[0]

    def row(prompt: str, *answers: str) -> list[Encoded]:
        return [encode_example(tokenizer, wrap(prompt), answer) for answer in answers]

    train, test = (task.read(task.file(args.data, s), s, 42) for s in ("train", "test"))
    trained = [row(e.prompt, e.answer, *([e.rejected] if e.rejected else [])) for e in train]
    generated = test[0].generated
    if generated:
        asked = [[(tokenizer.encode(wrap(e.prompt)), [])] for e in test]
    else:
        asked = [row(e.question, *e.right, *e.wrong) for e in test]
    trained, asked = (sorted(rows, key=size, reverse=True) for rows in (trained, asked))
    return trained, asked, task.max_new_tokens if generated else 0


def size(row: list[Encoded]) -> int:
    return sum(len(ids) for ids, _ in row)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg, shared = parser.add_argument, common_parser("").parse_args([])
    arg("--model", default=shared.model, help="a folder, or a hub id (default: %(default)s)")
    arg("--task", help="take the texts of this task (default: made-up texts of --length tokens)")
    arg("--data", type=Path, default=shared.data, help="the tasks' data (default: data/mini)")
    arg("--chat", action="store_true", help="the task's texts are asked in the chat template")
    arg("--length", type=natural, default=512, help="tokens of a made-up text"
        " (default: %(default)s)")  # fmt: skip
    arg("--gpus", type=natural, default=1, help="GPUs, one for each process (default: 1)")
    arg("--memory", type=natural, default=80, help="GB (10^9 bytes) of a GPU (default: 80)")
    arg("--dtype", default="bfloat16", choices=DTYPES, help="of the weights (default: %(default)s)")
    arg("--batch-size", type=natural, default=8, help="examples of a training step, over all GPUs"
        " (default: %(default)s)")  # fmt: skip
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--quantize", choices=["nf4"], help="the weights in 4 bits (default: in --dtype)"
    )
    way.add_argument("--shard", action="store_true", help="the weights are split over --gpus")
    args = parser.parse_args(argv)
    if args.length <= ANSWER:
        parser.error(f"--length: expected more than the {ANSWER} tokens of an answer")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = find_folder(args.model, ("*.json", "tokenizer.model", "*.jinja"))
    config, dtype = ModelConfig.from_file(folder / "config.json"), DTYPES[args.dtype]
    trained, asked, new = read_rows(args, folder)
    nf4 = bool(args.quantize or config.stored_in_4_bits)
    weights = weight_bytes(config, dtype, args.gpus if args.shard else 1, nf4)
    steps = {  # name -> texts at once, and the bytes that n of them need
        "training": (
            math.ceil(args.batch_size / args.gpus),
            lambda n: training_bytes(config, dtype, trained[:n]),
        ),
        "evaluation": (  # n counts given answers, of which a row has several
            BATCH,
            lambda n: evaluation_bytes(config, dtype, asked[: math.ceil(n / len(asked[0]))], new),
        ),
    }
    table, cures = {"weights": weights, "CUDA": CONTEXT}, []
    for name, (n, need) in steps.items():
        used = table[f"{name}, {n} at once"] = need(n)
        table[f"all in {name}"] = weights + CONTEXT + used
        room = args.memory * GB - weights - CONTEXT
        if used > room:
            halves = (n >> i for i in range(1, n.bit_length()))
            fits = next((half for half in halves if need(half) <= room), 0)
            cure = f"eval.py --batch-size {fits} fits"
            if fits:  # train.py validates as many at once, in the parts of its steps
                cure += f", in train.py --accumulate {n // fits}"
            if name == "training" and fits:  # a smaller batch would be another recipe
                cure = f"train.py --accumulate {math.ceil(n / fits)} fits"
            cures.append(cure if fits else f"no {name} fits: --quantize nf4, or --shard and --gpus")
    if args.task:
        states = sum(map(size, trained)) * config.hidden_size * dtype.itemsize
        table["kept states (RAM), at most"] = min(states, MAX_BYTES)
    print(
        f"{args.model}, {args.dtype}, --gpus {args.gpus}, {args.task or 'made-up texts'}: rows of"
        f" up to {size(trained[0])} tokens in training, {size(asked[0])} in evaluation\n\n"
        "GB of each GPU, computed"
    )
    for name, n_bytes in table.items():
        print(f"{name:28}{n_bytes / GB:10.3f}")
    print(f"{f'fits {args.memory} GB':28}{'no' if cures else 'yes':>10}", *cures, sep="\n  ")


if __name__ == "__main__":
    errors.run(main)
