"""What the three scripts share: the opened model, tokenizer and task, and the folder of a run."""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from lofit import files
from lofit.errors import InputError, warn
from lofit.files import append, hash_of
from lofit.heads import head_grid, remove_edits
from lofit.llm.checkpoint import DTYPES, Whole, load_model
from lofit.llm.hub import find_folder, local_folder, weight_files
from lofit.llm.model import CausalLM
from lofit.llm.tokenizer import Tokenizer, load_tokenizer
from lofit.objectives import Accumulated, CrossEntropy, Objective, Preference
from lofit.recipes import Recipe, find_recipe
from lofit.run.files import VERSION
from lofit.tasks import Example, Task, find_tasks

MOST_UNKNOWN = 0.25  # share of unknown tokens with which a training means nothing
AMPERE = (8, 0)  # the first GPUs that compute in bfloat16; older ones emulate it
LARGE = 100 * 10**6  # bytes of weights, see `pick_dtype`


@dataclass
class Run:
    """A model, a task, and the folder that a script fills with what it finds about the two."""

    script: str
    folder: Path
    model: CausalLM
    tokenizer: Tokenizer
    task: Task
    data: Path
    recipe: Recipe
    origin: str  # of the recipe's values, to be printed
    seed: int
    plain: bool
    wrap: Callable[[str], str]  # a prompt as the chat template asks it; without --chat as it is
    info: dict  # what every file of the run carries: what it was made for, and with what settings
    parts: int = 1  # of a batch, see `Accumulated`
    processes: str = ""  # "shared" under torchrun, "sharded" if the weights are split over them

    @property
    def title(self) -> str:
        return f"{_short_name(self.info['model'])}, {self.task.name}"

    def setting(self, name: str, flag: object, default: object, origin: str = ""):
        """The flag if it was given, else the default; noted, and printed with its origin."""
        value, source = (default, origin or self.origin) if flag is None else (flag, "flag")
        self.info["settings"][name] = value
        print(f"  {name:12}{value!s:>10}   ({source})")
        return value

    def log(self, record: dict) -> None:
        line = {"script": self.script, "time": time.time()} | record
        append(self.folder / "log.jsonl", line)

    def read(self, split: str, n: int | None = None) -> list[Example]:
        """The examples of a split, or n of them, drawn by the seed."""
        path = self.task.file(self.data, split)
        examples = self.task.read(path, split, self.seed)
        if not examples:
            raise InputError(f"{path}: the split is empty; expected at least one example")
        if n is None:
            return examples
        if n > len(examples):
            raise InputError(f"--n-train {n}: {path} has {len(examples)} examples")
        self.info["settings"][f"n_{split}"] = n
        return random.Random(self.seed).sample(examples, n)


@contextmanager
def open_runs(args: argparse.Namespace, script: str, suffix: str = "") -> Iterator[Iterator[Run]]:
    """A run of each task that --task names (TruthfulQA: two folds), all of one model; their folders
    are locked while they last. What can be checked is checked here, before work begins."""
    tasks, processes, way, device = find_tasks(args.task), "", Whole, args.device
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        from lofit.distributed import Sharded, join, wait

        device, processes = join(device), "sharded" if args.shard else "shared"
        way = Sharded if args.shard else Whole
    elif args.shard:
        raise InputError("--shard: one process has nothing to split; start by torchrun")
    if args.quantize:
        if args.shard:
            raise InputError("--quantize: not with --shard; a process keeps all of the 4 bits")
        from lofit.quantize import Quantized as way  # noqa: N813
    device = pick_device(device)
    n_bytes = sum(path.stat().st_size for path in weight_files(find_folder(args.model)))
    model = load_model(args.model, pick_dtype(args.dtype, device, n_bytes), device, way)
    wrap, end_of_turn = str, None
    if args.chat:
        from lofit.llm.chat import load_chat_template

        wrap, end_of_turn = load_chat_template(args.model)
    tokenizer = load_tokenizer(args.model, end_of_turn)
    first = Run(
        script, Path(), model, tokenizer, tasks[0], args.data, None, "", args.seed, args.plain,
        wrap, {}, getattr(args, "accumulate", 1), processes,
    )  # fmt: skip
    runs = _runs(args, first, tasks, suffix)
    try:
        yield runs
        if processes:
            wait()  # what the first process wrote is there for all
    finally:
        runs.close()  # in a notebook the process lives on: unlock the folder, whatever happened


def _runs(args: argparse.Namespace, first: Run, tasks: list[Task], suffix: str) -> Iterator[Run]:
    source, weight = first.model.source, first.model.lm_head.weight
    quantized = args.quantize or ("stored" if first.model.config.stored_in_4_bits else None)
    for task in tasks:
        remove_edits(first.model)
        origin, recipe = find_recipe(
            first.model.config, task.name.partition("-")[0], source.n_parameters
        )
        training = task.file(args.data, "train")
        info = {
            "version": VERSION, "model": source.name, "revision": source.revision,
            "fingerprint": source.fingerprint, "task": task.name, "data": str(training.parent),
            "data_hash": hash_of(training), "chat": args.chat,
            "plain": args.plain, "seed": args.seed,
            "settings": {"dtype": str(weight.dtype).removeprefix("torch."), "quantize": quantized},
        }  # fmt: skip
        if first.parts > 1:  # the same gradient, but for its last bits
            info["settings"]["accumulate"] = first.parts
        folder = run_folder(args, task, suffix, alone=len(tasks) == 1)
        run = replace(first, folder=folder, task=task, recipe=recipe, origin=origin, info=info)
        with _locked(folder):
            layers, heads = head_grid(run.model)
            print(
                f"{source.name}: {source.n_parameters:,} parameters, {layers} layers x {heads}"
                f" heads, {info['settings']['dtype']} on {weight.device} -> {folder}/"
            )
            gpu = weight.is_cuda and torch.cuda.get_device_name(weight.device)
            run.log({"device": gpu or weight.device.type})
            yield run


def run_folder(args: argparse.Namespace, task: Task, suffix: str, alone: bool) -> Path:
    """--run (of several tasks a folder in it for each), or runs/<model>/<task><suffix>."""
    if args.run:
        return args.run if alone else args.run / task.name
    return Path("runs") / _short_name(args.model) / f"{task.name}{suffix}"


def _short_name(model: str) -> str:
    """The last part of a folder's path, or the hub id."""
    local = local_folder(model)
    return local.resolve().name if local else model.replace("/", "--")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a run's folder and hold it, against another process that writes to the same."""
    if not files.WRITES:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch()
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder}: another process writes to it; wait for it, or choose another by --run"
        ) from None
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another by --run"
        ) from None
    for partial in folder.glob(".*.partial"):  # of a process that was killed
        if partial.is_file():  # not an export's folder, which may be in the making
            partial.unlink()
    try:
        yield
    finally:
        lock.release()


def make_objective(run: Run, examples: list[Example], split: str) -> Objective:
    """What to train on: DPO for examples with a rejected answer, else cross-entropy."""
    names = tuple(e.where for e in examples)
    positions = run.model.config.max_position_embeddings
    limit = min(run.task.max_length or positions, positions)
    if examples[0].rejected is None:
        texts = [(run.wrap(e.prompt), e.answer) for e in examples]
        objective = CrossEntropy(run.model, run.tokenizer, texts, limit, names)
    else:
        texts = [(run.wrap(e.prompt), e.answer, e.rejected) for e in examples]
        objective = Preference(run.model, run.tokenizer, texts, limit, names, run.plain)
    where = f"{run.task.file(run.data, split)}"
    _check_vocabulary(run.tokenizer, objective, where)
    _warn_of_boundaries(run.tokenizer, [prompt for prompt, *_ in texts], objective, names)
    # Each process caches the states of its own rows; split weights need all of them to do the same
    if not run.plain and run.processes != "sharded":
        objective = faster(objective)
    if run.processes:
        from lofit.distributed import SharedObjective

        objective = SharedObjective(objective)
    # Parts of the whole batch, and each part shared: so all processes have as many parts
    return Accumulated(objective, run.parts) if run.parts > 1 else objective


def faster(objective: Objective) -> Objective:
    """The same loss with less work: wrappers that --plain leaves out."""
    from lofit.fast.hidden_cache import HiddenCache

    objective = HiddenCache(objective)
    if uses_graphs(objective.model):
        from lofit.fast.graphs import GraphedObjective

        return GraphedObjective(objective)
    return objective


def uses_graphs(model: CausalLM) -> bool:
    """Whether steps are captured as CUDA graphs: not by default, for no GPU has run them yet."""
    wanted = os.environ.get("LOFIT_CUDA_GRAPHS") == "1"
    return wanted and model.lm_head.weight.device.type == "cuda"


def _check_vocabulary(tokenizer: Tokenizer, objective: Objective, where: str) -> None:
    """mini-llama knows 891 words: what it cannot read it cannot learn."""
    ids = [i for ids, _ in objective.texts for i in ids]
    share = ids.count(tokenizer.unk_id) / len(ids)
    message = f"{where}: {share:.1%} of the tokens are unknown to this model's tokenizer"
    if share > MOST_UNKNOWN:
        raise InputError(f"{message}; take a model that can read these texts by --model")
    if share:
        warn(message)


def _warn_of_boundaries(
    tokenizer: Tokenizer, prompts: list[str], objective: Objective, names: tuple[str, ...]
) -> None:
    """Warn where a prompt alone, as it will be asked, has other tokens than in front of its answer,
    as it is trained: a space at its end often becomes part of the answer's first word."""
    texts = objective.texts[:: len(objective.texts) // len(prompts)]  # of a pair the first
    trained = [[t for t, label in zip(*text, strict=True) if label < 0] for text in texts]
    each = zip(prompts, trained, names, strict=True)
    wrong = [name for prompt, ids, name in each if tokenizer.encode(prompt) != ids]
    if wrong:
        warn(
            "the prompt ends inside a token, so it is asked with other tokens than it is trained"
            " with; move a space from the end of the prompt to the start of the answer",
            wrong,
        )


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu. InputError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable here ({reason})") from None
    return name


def pick_dtype(name: str, device: str, n_bytes: int) -> torch.dtype:
    """auto -> bfloat16 where it is faster for weights of so many bytes as stored, else float32.

    That is where matrix units compute it (a GPU from Ampere on, a CPU with AMX), and on AMD's CPUs
    with AVX512-bf16 for models that are not tiny (docs/speed.md).
    """
    if name != "auto":
        return DTYPES[name]
    if device == "cpu":
        fast = torch.cpu._is_amx_tile_supported()
        fast = fast or (n_bytes >= LARGE and _is_amd() and torch.cpu._is_avx512_bf16_supported())
    else:
        fast = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= AMPERE
    return torch.bfloat16 if fast else torch.float32


def _is_amd() -> bool:
    """False where the system does not say."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
