"""What the three scripts share: common arguments, and the opened model, task and run folder."""

import argparse
import json
import time
from pathlib import Path
from types import ModuleType

import torch

from lofit.checkpoint import load_model
from lofit.errors import InputError
from lofit.generate import generate_all
from lofit.losses import answer_cross_entropy, check_length, collate, encode_example
from lofit.recipes import find_recipe
from lofit.tasks import Example, mquake
from lofit.tokenizer import load_tokenizer

TASKS: dict[str, ModuleType] = {"mquake": mquake}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LENGTH = 400  # tokens of a training example, as in the paper's code
Encoded = list[tuple[list[int], list[int]]]  # (ids, labels) an example


def add_common_args(parser: argparse.ArgumentParser) -> None:
    """The arguments that every script has. What is left out takes the value that is printed."""
    arg = parser.add_argument
    arg("--model", default="weights/mini-llama", help="a folder or a hub id (default: %(default)s)")
    arg("--revision", help="branch, tag or commit of a hub id")
    arg("--task", default="mquake", choices=sorted(TASKS))
    arg("--data", type=Path, default=Path("data/mini"), help="folder that holds MQuAKE/")
    arg("--seed", type=int, default=42)
    arg("--run", type=Path, help="run folder (default: runs/<model>/<task>)")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arg("--dtype", default="auto", choices=["auto", *DTYPES], help="of the base model's weights")


class Session:
    """An opened run: frozen base model, tokenizer, task and the folder that takes the results.

    Opening checks everything that can be checked before work begins; raises InputError.
    """

    def __init__(self, args: argparse.Namespace, script: str, run_suffix: str = ""):
        self.script, self.seed, self.data = script, args.seed, args.data
        self.task_name, self.task = args.task, TASKS[args.task]
        self.device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, self.device)
        name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
        self.title = f"{name}, {args.task}"
        self.folder = args.run or Path("runs") / name.replace("/", "--") / (args.task + run_suffix)
        self.model = load_model(args.model, args.revision, dtype, self.device)
        self.tokenizer = load_tokenizer(args.model, args.revision)
        self.n_base = sum(p.numel() for p in self.model.parameters())
        self.recipe_name, self.recipe = find_recipe(self.model.config, args.task)
        self.settings: dict[str, object] = {"dtype": str(dtype).removeprefix("torch.")}
        self._open_log()
        print(
            f"{args.model}: {self.n_base:,} parameters, {self.model.config.num_hidden_layers}"
            f" layers x {self.model.config.num_attention_heads} heads,"
            f" {self.settings['dtype']} on {self.device} -> {self.folder}/"
        )

    def _open_log(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = (self.folder / "log.jsonl").open("a", encoding="utf-8", buffering=1)
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
            "data": str(self.data),
            "seed": self.seed,
            "settings": self.settings,
        }

    def log(self, record: dict) -> None:
        """Append a record to log.jsonl."""
        self._log.write(json.dumps({"script": self.script, "time": time.time()} | record) + "\n")

    def read(self, split: str) -> list[Example]:
        """The examples of a split; InputError if the file is missing, malformed or empty."""
        return self.task.read(self.data, split)

    def encode(self, examples: list[Example], split: str) -> Encoded:
        """Training form of examples, checked against the model's positions."""
        encoded = [encode_example(self.tokenizer, e.prompt, e.answer) for e in examples]
        limit = min(MAX_LENGTH, self.model.config.max_position_embeddings)
        check_length([len(ids) for ids, _ in encoded], limit, f"{self.data}, split {split}")
        return encoded

    def loss(self, encoded: Encoded) -> torch.Tensor:
        """Answer cross-entropy of one batch of encoded examples."""
        return answer_cross_entropy(self.model, collate(encoded, self.device))

    @torch.no_grad()
    def mean_loss(self, encoded: Encoded, batch_size: int) -> float:
        """Answer cross-entropy over all examples, in batches, weighted by their tokens."""
        total, n = 0.0, 0
        for start in range(0, len(encoded), batch_size):
            part = encoded[start : start + batch_size]
            tokens = sum(label >= 0 for _, labels in part for label in labels)
            total, n = total + tokens * self.loss(part).item(), n + tokens
        return total / n

    def predict(self, examples: list[Example], batch_size: int, description: str) -> list[dict]:
        """Greedy prediction and its scores for each example, with the model's present edits."""
        prompts = [self.tokenizer.encode(e.prompt) for e in examples]
        new = generate_all(
            self.model, prompts, self.task.MAX_NEW_TOKENS, self.tokenizer.eos_ids, batch_size,
            description,
        )  # fmt: skip
        found = []
        for example, prompt, tokens in zip(examples, prompts, new, strict=True):
            prediction = self.task.extract(self.tokenizer.decode(prompt + tokens))
            found.append({"prediction": prediction} | self.task.score(prediction, example))
        return found


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu. InputError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name}: not usable here ({str(error).splitlines()[0]})"
        ) from None
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """auto -> bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return DTYPES[name]
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
