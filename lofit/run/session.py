"""What the three scripts share: the opened model and task, and the folder of a run."""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch.distributed as dist
from tqdm import tqdm

from lofit import errors
from lofit.errors import InputError
from lofit.files import is_first, lock_folder, sweep_partials
from lofit.heads import attached_heads, edits_off, get_edits, set_edits
from lofit.llm.checkpoint import find_folder, weight_files
from lofit.llm.device import pick_device, pick_dtype
from lofit.llm.generate import Decoding, decode_step
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, Objective, Preference
from lofit.recipes import find_recipe
from lofit.run.adapters import load_tuned
from lofit.run.arguments import find_task, folds_of, model_name, run_folder
from lofit.run.artefacts import hash_of_file, hash_of_text
from lofit.run.resume import ScoredBatches, TrainingState
from lofit.tasks import Example
from lofit.tasks.own import OwnTask
from lofit.training import OnStep, Training

MOST_UNKNOWN = 0.25  # share of unknown tokens with which a training means nothing


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` with the errors and signals of `errors.run`; under torchrun as one
    process of a group."""
    if dist.is_torchelastic_launched():
        from lofit.distributed import group

        group.run(main)
    else:
        errors.run(main)


class Session:
    """An opened model, tokenizer and task, and the run folder of one fold at a time.

    Opening checks everything that can be checked before work begins; raises InputError. `folds`
    enters the folds; before that there is no folder.
    """

    def __init__(self, args: argparse.Namespace, script: str, run_suffix: str = ""):
        self.args, self.script, self.seed = args, script, args.seed
        self.task_name, self.task = find_task(args.task)
        self.all_folds = folds_of(args)
        self.data = getattr(self.task, "folder", None) or args.data
        self.device = self._device()
        files = weight_files(find_folder(args.model, args.revision))
        n_bytes = sum(path.stat().st_size for path in files)
        dtype = pick_dtype(args.dtype, self.device, n_bytes)
        self.dtype = str(dtype).removeprefix("torch.")
        self.base_folder = run_folder(args, run_suffix)
        shards = self._shards()
        self.model = load_tuned(args.model, args.revision, dtype, self.device, shards)
        self.tokenizer = load_tokenizer(args.model, args.revision, not args.chat)
        self.chat, self.plain, self.sharded = args.chat, args.plain, bool(shards)
        self.wrap = self._chat_template() if args.chat else str
        self.own_edits = get_edits(self.model)  # a checkpoint that the paper released has offsets
        with edits_off(self.model):
            self.n_base = sum(p.numel() for p in self.model.parameters())
        self.recipe_name, self.recipe = find_recipe(self.model.config, self.task_name)
        self.decode_step = decode_step  # eval.py may put a compiled one here
        self._check_compile()

    def _device(self) -> str:
        if not dist.is_initialized():
            if self.args.shard:
                raise InputError("--shard: one process has nothing to split; start by torchrun")
            return pick_device(self.args.device)
        from lofit.distributed import group

        return pick_device(group.device(self.args.device))

    def _shards(self):
        if not self.args.shard:
            return None
        from lofit.distributed.sharded import Shards

        return Shards(self.device)

    def _chat_template(self) -> Callable[[str], str]:
        from lofit.llm.chat import load_chat_template

        return load_chat_template(self.args.model, self.args.revision)

    def folds(self) -> Iterator[int | None]:
        """Enter each fold in turn: its folder, the model as it was opened, settings of its own.
        None for a task without folds. After the last one the run is whole, and what was kept for
        continuing it goes."""
        unfinished = []
        for fold in self.all_folds:
            self._enter(fold)
            unfinished.append(self.unfinished)
            yield fold
        if is_first():
            for path in unfinished:
                path.unlink(missing_ok=True)

    def _enter(self, fold: int | None) -> None:
        self.fold, self.folder = fold, self.base_folder
        self.title = f"{model_name(self.args)}, {self.task_name}"
        if fold is not None:
            self.title, self.folder = f"{self.title} fold {fold}", self.folder / f"fold{fold}"
        set_edits(self.model, self.own_edits)
        self.settings: dict[str, object] = {"dtype": self.dtype}
        self.log_file, self.log_failed = self.folder / "log.jsonl", False
        self.unfinished = self.folder / f"{self.script}.unfinished"
        self.data_hash = hash_of_file(self.task.path(self.data, "train", fold))
        if is_first():
            self._open_folder()
        if dist.is_initialized():
            from lofit.distributed import group

            # a barrier too: rank 0 has prepared the folder
            group.agree("dtype and weights", [self.dtype, self.model.source.fingerprint])
        config = self.model.config
        print(
            f"{self.args.model}: {self.n_base:,} parameters, {config.num_hidden_layers} layers x"
            f" {config.num_attention_heads} heads, {self.dtype} on {self.device} -> {self.folder}/"
        )

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(self.folder)
            sweep_partials(self.folder)
            self.log_file.touch()
            if self.args.fresh:
                self.unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another by --run"
            ) from None

    def setting(self, name: str, flag: object, default: object, origin: str | None = None):
        """A setting's value: the flag if given, else the default; prints it with its origin."""
        value = default if flag is None else flag
        self.settings[name] = value
        source = (origin or self.recipe_name) if flag is None else "flag"
        print(f"  {name:12}{value!s:>10}   ({source})")
        return value

    def info(self) -> dict:
        """What every artefact carries: model, revision, fingerprint, task, seed and settings."""
        source = self.model.source
        return {
            "model": source.name,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
            "task": self.task_name,
            "fold": self.fold,
            "chat": self.chat,
            "plain": self.plain,
            "data": str(self.data),
            "data_hash": self.data_hash,
            "seed": self.seed,
            "settings": self.settings,
        }

    def log(self, record: dict) -> None:
        """Append a record to log.jsonl. Where that fails the run goes on, and says so once."""
        if not is_first():
            return
        line = json.dumps({"script": self.script, "time": time.time()} | record)
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self.log_failed:
                print(f"{self.log_file}: cannot be written ({error.strerror})", file=sys.stderr)
            self.log_failed = True

    def read(self, split: str, n: int | None = None) -> list[Example]:
        """The examples of a split, or n of them, drawn by the seed. Raises InputError if the files
        are missing, malformed or empty, or have fewer than n."""
        examples = self.task.read(self.data, split, self.seed, self.fold)
        if n is None:
            return examples
        if not 1 <= n <= len(examples):
            raise InputError(f"--n-train {n}: the {split} split has 1 to {len(examples)} examples")
        self.settings[f"n_{split}"] = n
        return random.Random(self.seed).sample(examples, n)

    def objective(self, examples: list[Example], split: str) -> Objective:
        """What to train on: DPO for examples with a rejected answer, else cross-entropy."""
        where = f"{self.data}, split {split}"
        if examples[0].rejected is None:
            kind, texts = CrossEntropy, [(self.wrap(e.prompt), e.answer) for e in examples]
        else:
            kind = Preference
            texts = [(self.wrap(e.prompt), e.answer, e.rejected) for e in examples]
        limit = {} if self._max_length() is None else {"max_length": self._max_length()}
        found = kind(self.model, self.tokenizer, texts, where, self.plain, **limit)
        self._check_vocabulary(found.texts(), where)
        found.hash = hash_of_text((texts, found.texts()))
        if not dist.is_initialized():
            compile, cuda = (
                bool(getattr(self.args, "compile", None)),
                self.device.startswith("cuda"),
            )
            if self.plain or not (cuda or compile) or self._pads_badly():
                return found
            from lofit.fast.graphs import GraphedObjective

            return GraphedObjective(found, capture=cuda, compile=compile)
        from lofit.distributed.loss import DistributedObjective
        from lofit.distributed.sharded import gathered, in_step

        return DistributedObjective(
            found, partial(gathered, self.model), partial(in_step, self.model)
        )

    def _pads_badly(self) -> bool:
        """Whether padding changes angles: those of dynamic RoPE follow a batch's longest row."""
        kinds = self.model.config.rope_parameters.values()
        return any(rope["rope_type"] == "dynamic" for rope in kinds)

    def _check_compile(self) -> None:
        """InputError where --compile in training would do nothing."""
        reasons = {
            "--plain": self.plain,
            "several processes": dist.is_initialized(),
            "a model with dynamic RoPE": self._pads_badly(),
        }
        for reason in (name for name, holds in reasons.items() if holds):
            if self.script != "eval" and getattr(self.args, "compile", None):
                raise InputError(f"--compile: not used with {reason}; leave it out")

    def decoding(self) -> Decoding:
        """How to generate with the edits that are attached now."""
        plain = self.plain or dist.is_initialized() or not self.device.startswith("cuda")
        if plain or self.decode_step is not decode_step:
            return Decoding(self.decode_step)
        from lofit.fast.decoding import GraphedDecoding

        return GraphedDecoding()

    def _max_length(self) -> int | None:
        """--max-length; the model's positions for tasks that are not the paper's; None: its own."""
        own = isinstance(self.task, OwnTask)
        positions = self.model.config.max_position_embeddings if own else None
        return self.args.max_length or positions

    def _check_vocabulary(self, texts: list[list[int]], where: str) -> None:
        """InputError if the tokenizer cannot read much of these texts; a warning for less."""
        unknown = sum(ids.count(self.tokenizer.unk_id) for ids in texts)
        share = unknown / max(1, sum(map(len, texts)))
        message = f"{where}: {share:.1%} of the tokens are unknown to this model's tokenizer"
        if share > MOST_UNKNOWN:
            raise InputError(f"{message}; take a model that can read these texts by --model")
        if unknown:
            print(f"warning: {message}", file=sys.stderr)

    @contextmanager
    def recorded(self, training: Training) -> Iterator[OnStep]:
        """What a training's steps leave, as an `on_step` for `training.fit`: log.jsonl, a progress
        bar, and the state from which the same command continues after a kill. A training that was
        stopped before continues."""
        about = self.info() | {"heads": attached_heads(self.model)}
        about = self._depends_on(about, training.objective.hash)
        state = TrainingState(self.unfinished, about, self.log_file)
        state.restore(training)
        if dist.is_initialized():
            from lofit.distributed import group

            group.agree("the step to continue from", len(training.losses))
        done = len(training.losses)
        with tqdm(total=training.total, initial=done, unit="step", disable=None, leave=False) as b:

            def on_step(training: Training, record: dict) -> None:
                self.log(record)
                state(training, record)
                b.update()

            try:
                yield on_step
            except KeyboardInterrupt:
                state.write()
                raise

    def scored_batches(self, about: dict, examples: list[Example]) -> ScoredBatches:
        """What this run's evaluation has scored. about: all that it depends on but the offsets."""
        about = self._depends_on(about, hash_of_text((self.wrap("?"), examples)))
        return ScoredBatches(self.unfinished, about)

    def _depends_on(self, about: dict, examples: str) -> dict:
        config = hash_of_text(self.model.config)
        return {"script": self.script, "config": config, "examples": examples} | about

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens after which nothing counts in a generated answer."""
        return frozenset() if self.task.STOP is None else self.tokenizer.ids_with(self.task.STOP)
