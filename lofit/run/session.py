"""What the three scripts share: the opened model, task and run folder."""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import torch

from lofit.distributed import group as parallel
from lofit.distributed.loss import shared
from lofit.distributed.sharded import Shards, gathered, in_step, is_sharded
from lofit.errors import InputError
from lofit.fast.packed import packed_weights
from lofit.files import lock_folder, sweep_partials
from lofit.heads import attached_heads, edits_off, folded_offsets
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import find_folder, weight_files
from lofit.llm.device import pick_device, pick_dtype
from lofit.llm.generate import Keep, compute, decode_step, generate_all
from lofit.llm.scoring import score_answers
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy, Objective, Preference, mean_loss
from lofit.recipes import find_recipe
from lofit.run.adapters import load_tuned
from lofit.run.arguments import find_task, model_name, run_folder
from lofit.run.resume import Progress, Scored, digest
from lofit.run.summary import mean
from lofit.tasks import Example
from lofit.training import Schedule, fit

EVAL_BATCH = 64


class Session:
    """An opened run: frozen base model, tokenizer, task and the folder that takes the results.

    Opening checks everything that can be checked before work begins; raises InputError.
    """

    def __init__(
        self, args: argparse.Namespace, script: str, fold: int | None = None, run_suffix: str = ""
    ):
        self.script, self.seed, self.fold = script, args.seed, fold
        self.task_name, self.task = find_task(args.task)
        self.data = getattr(self.task, "folder", None) or args.data
        self.device = pick_device(parallel.device(args.device))
        if args.shard and not parallel.several():
            raise InputError("--shard: one process has nothing to split; start by torchrun")
        files = weight_files(find_folder(args.model, args.revision))
        n_bytes = sum(path.stat().st_size for path in files)
        dtype = pick_dtype(args.dtype, self.device, n_bytes)
        self.title = f"{model_name(args)}, {self.task_name}"
        self.folder = run_folder(args, run_suffix)
        if fold is not None:
            self.title, self.folder = f"{self.title} fold {fold}", self.folder / f"fold{fold}"
        shards = Shards(self.device) if args.shard else None
        self.model = load_tuned(args.model, args.revision, dtype, self.device, shards)
        self.tokenizer = load_tokenizer(args.model, args.revision, not args.chat)
        self.chat, self.plain = args.chat, args.plain
        self.wrap = load_chat_template(args.model, args.revision) if args.chat else str
        with edits_off(self.model):  # a checkpoint that the paper released has offsets
            self.n_base = sum(p.numel() for p in self.model.parameters())
        self.recipe_name, self.recipe = find_recipe(self.model.config, self.task_name)
        self.decode_step = decode_step  # eval.py may put a compiled one here
        self.settings: dict[str, object] = {"dtype": str(dtype).removeprefix("torch.")}
        self._log, self.log_failed = self.folder / "log.jsonl", False
        self.unfinished, self.digests = self.folder / f"{script}.unfinished", {}
        if parallel.is_first():
            self._open_folder(args.fresh)
        # behind what the first does to the folder, which all read from
        parallel.agree("dtype and weights", [str(dtype), self.model.source.fingerprint])
        print(
            f"{args.model}: {self.n_base:,} parameters, {self.model.config.num_hidden_layers}"
            f" layers x {self.model.config.num_attention_heads} heads,"
            f" {self.settings['dtype']} on {self.device} -> {self.folder}/"
        )

    def _open_folder(self, fresh: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(self.folder)
            sweep_partials(self.folder)
            self._log.touch()
            if fresh:
                self.finish()
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
            "seed": self.seed,
            "settings": self.settings,
        }

    def log(self, record: dict) -> None:
        """Append a record to log.jsonl. Where that fails the run goes on, and says so once."""
        if not parallel.is_first():
            return
        line = json.dumps({"script": self.script, "time": time.time()} | record)
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self.log_failed:
                print(f"{self._log}: cannot be written ({error.strerror})", file=sys.stderr)
            self.log_failed = True

    def progress(self, train: Objective, *generators: torch.Generator) -> Progress:
        """The state of this run's training, of the heads that are attached now; generators: what
        the loss draws from."""
        about = self.info() | {"heads": attached_heads(self.model)}
        about = self._of_this(about, self.digests["train"])
        return Progress(self.unfinished, about, self._log, train.remember, generators)

    def scored(self, about: dict, examples: list[Example]) -> Scored:
        """What this run's evaluation has scored. about: all that it depends on, but the offsets."""
        return Scored(self.unfinished, self._of_this(about, digest((self.wrap("?"), examples))))

    def _of_this(self, about: dict, examples: str) -> dict:
        config = digest(self.model.config)
        return {"script": self.script, "config": config, "examples": examples} | about

    def finish(self) -> None:
        """The run is whole: what was kept for going on with it is no longer needed."""
        if parallel.is_first():
            self.unfinished.unlink(missing_ok=True)

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

    def contrast(self, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
        """(ids of prompt + right answer, prompt + wrong answer) of each example. Wrong is what was
        rejected, what was true before the edit, another choice, or else another example's answer.
        """
        answers = sorted({e.answer for e in examples})
        draw, found = random.Random(self.seed), []
        for e in examples:
            others = [answer for answer in answers if answer != e.answer]
            known = [e.rejected] if e.rejected else [*e.outdated, *e.wrong]
            if not known and not others:
                raise InputError(f"{self.data}: all answers are alike, there is no wrong one")
            texts = (e.answer, known[0] if known else draw.choice(others))
            found.append(
                tuple(self.tokenizer.encode_pair(self.wrap(e.prompt), text)[0] for text in texts)
            )
        return found

    def objective(self, examples: list[Example], split: str) -> Objective:
        """What to train on: DPO for examples with a rejected answer, else cross-entropy."""
        where = f"{self.data}, split {split}"
        if examples[0].rejected is None:
            kind, texts = CrossEntropy, [(self.wrap(e.prompt), e.answer) for e in examples]
        else:
            kind = Preference
            texts = [(self.wrap(e.prompt), e.answer, e.rejected) for e in examples]
        found = kind(self.model, self.tokenizer, texts, where, self.plain)
        self.digests[split] = digest((texts, found.texts()))
        return shared(found, partial(gathered, self.model), partial(in_step, self.model))

    def fit(
        self, parameters: list, train: Objective, val: list[Example], schedule: Schedule, when: str
    ) -> dict[str, float]:
        """Train the attached parameters, with a line for each epoch; returns the metrics on `val`
        after the last one. when: validate after "every" epoch, or the "last" alone."""
        held_out, metrics = self.objective(val, "val"), {}
        progress = self.progress(train)
        steps = fit(parameters, train.lengths, train.loss, schedule, self.seed, self.log, progress)
        for epoch, loss in steps:
            line = f"epoch {epoch}/{schedule.epochs}  loss {loss:.4f}"
            if when == "last" and epoch < schedule.epochs:
                print(line)
                continue
            val_loss = mean_loss(held_out, EVAL_BATCH)
            metrics = self.validate(val)
            self.log({"epoch": epoch, "train_loss": loss, "val_loss": val_loss, "val": metrics})
            name = self.task.MAIN_METRIC
            print(f"{line}  val loss {val_loss:.4f}  val {name} {metrics[name]:.1%}")
        return metrics

    def validate(self, val: list[Example] | None = None) -> dict[str, float]:
        """The metrics of the model as it is on the validation split."""
        scored = self.evaluate(val or self.read("val"), EVAL_BATCH, "validation")
        return {metric: mean([s[metric] for s in scored]) for metric in self.task.METRICS}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens behind which nothing counts."""
        return frozenset() if self.task.STOP is None else self.tokenizer.ids_with(self.task.STOP)

    def evaluate(
        self, examples: list[Example], batch_size: int, description: str, keep: Keep = compute
    ) -> list[dict]:
        """The scores of each example with the model's present edits, and what they are based on:
        a prediction, the log-probabilities of the given answers, or both."""
        ways = [self._predict] if examples[0].generated else []
        ways += [self._choose] if examples[0].right else []
        if parallel.several():  # batches are of their number: what is kept is what all found
            each, keep_all = compute, keep
        else:
            each, keep_all = keep, compute

        def score(own: list[Example]) -> list[dict]:
            found = []
            for i, way in enumerate(ways):
                with in_step(self.model):
                    found.append(way(own, batch_size, description, _apart(each, i)) if own else [])
            return [
                {k: v for part in row for k, v in part.items()} for row in zip(*found, strict=True)
            ]

        with nullcontext() if self.plain or is_sharded(self.model) else self._folded():
            return keep_all(lambda _: parallel.spread(examples, score), [])

    @contextmanager
    def _folded(self) -> Iterator[None]:
        """Of a split model there is nothing to fold into, nor to pack."""
        # a compiler sees no further than the packed products
        packed = packed_weights if self.decode_step is decode_step else nullcontext
        with folded_offsets(self.model), packed(self.model):
            yield

    def _choose(self, examples: list, batch_size: int, description: str, keep: Keep) -> list[dict]:
        asked = [(self.wrap(e.question), [*e.right, *e.wrong]) for e in examples]
        scores = score_answers(
            self.model, self.tokenizer, asked, batch_size, description, self.plain, keep
        )
        found = []
        for example, each in zip(examples, scores, strict=True):
            right, wrong = each[: len(example.right)], each[len(example.right) :]
            metrics = self.task.score_choices(right, wrong)
            found.append({"log_probs": {"right": right, "wrong": wrong}} | metrics)
        return found

    def _predict(self, examples: list, batch_size: int, description: str, keep: Keep) -> list[dict]:
        prompts = [self.tokenizer.encode_pair(self.wrap(e.prompt), "")[0] for e in examples]
        stop = frozenset() if self.plain else self.stop_ids
        new = generate_all(
            self.model, prompts, self.task.MAX_NEW_TOKENS, self.tokenizer.eos_ids, batch_size,
            description, stop, self.decode_step, keep,
        )  # fmt: skip
        found = []
        for example, prompt, tokens in zip(examples, prompts, new, strict=True):
            # decoded together: SentencePiece drops the space in front of a first word
            whole, before = (self.tokenizer.decode(ids) for ids in (prompt + tokens, prompt))
            prediction = self.task.extract(example.prompt, whole[len(before) :])
            found.append({"prediction": prediction} | self.task.score(prediction, example))
        return found


def _apart(keep: Keep, i: int) -> Keep:
    """keep, for the i-th of several ways to evaluate: equal rows of two ways are not the same."""
    return (lambda compute, rows: keep(lambda _: compute(rows), [-i, *rows])) if i else keep
