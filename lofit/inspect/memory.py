"""The memory that a run will take, computed from config.json alone: no weights are read.

    python -m lofit.inspect.memory --model meta-llama/Llama-3.1-8B --memory 24 --task clutrr --chat
    python -m lofit.inspect.memory --model meta-llama/Llama-3.1-70B --gpus 8

With --task the texts are the longest of its data (the tokenizer is read as well); without they have
--length tokens, as many as the paper's tasks allow. A training step (selection, which edits every
layer) and an evaluation's batch are run on tensors without values, and what is alive at the same
time is counted. What torch's allocator leaves unused, a few percent, is not.
"""

import argparse
import math
import weakref
from collections.abc import Callable
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
CONTEXT = GB // 2  # what CUDA and its libraries take in each process
ANSWER = 16  # tokens
Rows = list[list[Encoded]]  # what becomes a row of a batch: one text, or several with one beginning


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


def losses(model: CausalLM, rows: Rows) -> torch.Tensor:
    several = any(len(row) > 1 for row in rows)
    batch = pack(rows, "cpu") if several else collate([text for (text,) in rows], "cpu")
    return target_losses(model, batch)


def training_bytes(config: ModelConfig, dtype: torch.dtype, rows: Rows) -> int:
    """At the peak of a step of selection: activations, and the scales with AdamW's state."""
    with FakeTensorMode():
        model = empty_model(config, dtype)
        scales = torch.zeros(config.num_hidden_layers, config.num_attention_heads, config.head_dim)
        parameters = attach_scales(model, scales)
        with Alive(model) as alive:
            losses(model, rows).mean().backward()
        return alive.peak + 3 * sum(p.nbytes for p in parameters)  # they, and AdamW's two of each


@torch.no_grad()
def evaluation_bytes(config: ModelConfig, dtype: torch.dtype, rows: Rows, new: int) -> int:
    """At the peak of a batch: of `new` generated tokens with their cache; 0: of given answers."""
    with FakeTensorMode():
        model = empty_model(config, dtype)
        with Alive(model) as alive:
            if not new:
                losses(model, rows)
                return alive.peak
            n = max(len(ids) for ((ids, _),) in rows)
            cache = KVCache(model, len(rows), n + new)
            ids = torch.ones(len(rows), n, dtype=torch.int64)
            prefill(model, ids, torch.full((len(rows),), n), cache)
            return alive.peak


def weight_bytes(config: ModelConfig, dtype: torch.dtype, n: int) -> dict[str, int]:
    """All weights; with --shard on n processes what one keeps, its rows of each layer and the rest
    whole, and what it gathers beside them, a layer at a time."""
    with torch.device("meta"):
        model = empty_model(config, dtype)
    layers = [p for layer in model.model.layers for p in layer.parameters()]
    whole, split = sum(p.nbytes for p in model.parameters()), sum(p.nbytes for p in layers)
    rows = sum(p.nbytes // p.shape[0] * math.ceil(p.shape[0] / n) for p in layers)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    return {"all": whole, "own": whole - split + rows, "gathered": GATHERED * block}


class Texts:
    """What batches are made of: a task's texts, the longest first, or one that is made up.

    train, asked: rows; new: tokens to generate, 0 for given answers; n_tokens: of all of train.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.new, self.n_tokens = ANSWER, 0
        if not args.task:
            ids, labels = [1] * args.length, [IGNORE] * (args.length - ANSWER) + [1] * ANSWER
            self.train, self.asked = [[(ids, labels)]], [[(ids[ANSWER:], [])]]
            return
        wrap, end = load_chat_template(folder) if args.chat else (str, None)
        tokenizer, task = load_tokenizer(folder, end), find_tasks(args.task)[0]

        def row(prompt: str, *answers: str) -> list[Encoded]:
            return [encode_example(tokenizer, wrap(prompt), answer) for answer in answers]

        train, test = (task.read(task.file(args.data, s), s, args.seed) for s in ("train", "test"))
        self.train = [row(e.prompt, e.answer, *([e.rejected] if e.rejected else [])) for e in train]
        self.n_tokens = sum(map(size, self.train))
        if test[0].generated:
            self.new = task.max_new_tokens
            self.asked = [[(tokenizer.encode(wrap(e.prompt)), [])] for e in test]
        else:
            self.new = 0
            self.asked = [row(e.question, *e.right, *e.wrong) for e in test]
        self.train.sort(key=size, reverse=True)
        self.asked.sort(key=size, reverse=True)

    def longest(self, rows: Rows, n: int) -> Rows:
        """The n longest, or as many rows as have n given answers."""
        n = n if rows is self.train else math.ceil(n / len(rows[0]))
        return rows[:n] if len(rows) > 1 else rows * n


def size(row: list[Encoded]) -> int:
    return sum(len(ids) for ids, _ in row)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg, shared = parser.add_argument, common_parser("").parse_args([])
    parser.set_defaults(seed=shared.seed)
    arg("--model", default=shared.model, help="a folder, or a hub id (default: %(default)s)")
    arg("--task", help="whose data has the texts (default: none)")
    arg("--data", type=Path, default=shared.data, help="as of the scripts (default: data/mini)")
    arg("--chat", action="store_true", help="texts are asked in the chat template")
    arg("--length", type=natural, default=512, help="tokens of a text, without --task"
        " (default: %(default)s)")  # fmt: skip
    arg("--gpus", type=natural, default=1, help="processes, each with a GPU (default: 1)")
    arg("--memory", type=natural, default=80, help="GB (10^9 bytes) of each (default: 80)")
    arg("--dtype", default="bfloat16", choices=DTYPES, help="(default: %(default)s)")
    arg("--batch-size", type=natural, default=8, help="of a training step, over all processes"
        " (default: %(default)s)")  # fmt: skip
    arg("--eval-batch", type=natural, default=BATCH, help="of each process (default: 64)")
    args = parser.parse_args(argv)
    if args.length <= ANSWER:
        parser.error(f"--length: expected more than the {ANSWER} tokens of an answer")
    return args


def cure(need: Callable[[int], int], n: int, room: int, script: str) -> str:
    """The largest batch that fits, of the halves of n."""
    while n > 1:
        n //= 2
        if need(n) <= room:
            more = "; in training it changes the recipe" if script == "train.py" else ""
            return f"{script} --batch-size {n} fits{more}"
    return f"no batch of {script} fits: more --gpus (torchrun, --shard), or a smaller --dtype"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = find_folder(args.model, ("*.json", "tokenizer.model", "*.jinja"))
    config, dtype = ModelConfig.from_file(folder / "config.json"), DTYPES[args.dtype]
    texts, weights = Texts(args, folder), weight_bytes(config, dtype, args.gpus)

    def training(n: int) -> int:
        return training_bytes(config, dtype, texts.longest(texts.train, math.ceil(n / args.gpus)))

    def evaluation(n: int) -> int:
        return evaluation_bytes(config, dtype, texts.longest(texts.asked, n), texts.new)

    print(
        f"{args.model}, {args.dtype}, {args.gpus} processes, {args.task or 'made-up texts'}: rows"
        f" of up to {size(texts.train[0])} tokens in training, {size(texts.asked[0])} in evaluation"
    )
    ways = {"": weights["all"]}
    if args.gpus > 1:
        ways["--shard"] = weights["own"] + weights["gathered"]
    table: dict[str, list[int]] = {"weights": list(ways.values()), "CUDA": [CONTEXT] * len(ways)}
    cures = {way: [] for way in ways}
    for name, need, n, script in (
        ("training", training, args.batch_size, "train.py"),
        ("evaluation", evaluation, args.eval_batch, "eval.py"),
    ):
        used, rooms = need(n), [args.memory * GB - CONTEXT - size for size in ways.values()]
        table[f"{name}, batch {n}"] = [used] * len(ways)
        table[f"all in {name}"] = [args.memory * GB - room + used for room in rooms]
        for way, room in zip(ways, rooms, strict=True):
            cures[way] += [cure(need, n, room, script)] if used > room else []
    print(f"\n{'GB of a process, computed':28}" + "".join(f"{way:>10}" for way in ways))
    for name, sizes in table.items():
        print(f"{name:28}" + "".join(f"{each / GB:10.3f}" for each in sizes))
    if texts.n_tokens:
        kept = min(texts.n_tokens * config.hidden_size * dtype.itemsize, MAX_BYTES)
        print(f"{'kept states (RAM), at most':28}{kept / GB:10.3f}")
    answers = ("no" if cures[way] else "yes" for way in ways)
    print(f"{f'fits {args.memory} GB':28}" + "".join(f"{answer:>10}" for answer in answers))
    for way, lines in cures.items():
        for line in lines:
            print(f"  {way or 'to make it fit'}: {line}")


if __name__ == "__main__":
    errors.run(main)
