"""Tasks: each reads its splits, writes prompts and scores predictions. It knows no model.

To add one: a file beside mquake.py with a TASK, and its line in `named_tasks`.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lofit.errors import InputError


@dataclass(frozen=True)
class Example:
    """One item. Trained on prompt + answer, or to prefer answer to rejected (DPO); evaluated by
    generation against references, or by the log-probabilities of right and wrong answers."""

    prompt: str
    answer: str
    rejected: str | None = None
    references: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()  # what was true before the edit (MQuAKE)
    question: str = ""  # what the right and wrong answers follow
    right: tuple[str, ...] = ()  # the best one first
    wrong: tuple[str, ...] = ()
    value: float | None = None  # the last number that the generated text must have
    group: str = ""  # scores are also reported by it
    unit: str = ""  # what items share (MQuAKE's edit, CLUTRR's chain, TruthfulQA's category)
    rules: tuple[tuple[str, str], ...] = ()  # (name, answer) of cheap rules that know no model
    where: str = field(default="", compare=False)  # file and line, for errors

    @property
    def generated(self) -> bool:
        """Whether it is evaluated by generation; by given answers if there are `right` ones."""
        return bool(self.references) or not self.right

    @property
    def ambiguous(self) -> bool:
        """Whether one of the given answers begins another (" X", " X Y"): the longer one can then
        never be the more probable, unless the end of the text counts too."""
        given = (*self.right, *self.wrong)
        return any(a != b and b.startswith(a) for a in given for b in given)


@dataclass(frozen=True)
class Task:
    """How a data set is read and scored.

    name: also of its run folder. metrics: the first one is the main one. extract and score are for
    tasks that generate, score_choices for those with given answers; a task may be both.
    """

    name: str
    file: Callable[[Path, str], Path]  # folder of --data, split -> its file
    read: Callable[[Path, str, int], list[Example]]  # that file, split, seed
    metrics: tuple[str, ...]
    max_length: int | None = None  # tokens of an example, as in the paper's code; None: the model's
    max_new_tokens: int = 16
    stop: str | None = None  # a character after which nothing counts in a generated answer
    extract: Callable[[Example, str], str] | None = None  # example, continuation -> prediction
    score: Callable[[str, Example], dict[str, float]] | None = None
    score_choices: Callable[[list[float], list[float]], dict[str, float]] | None = None
    ask: Callable[[str], str] | None = None  # a question of a person's -> its prompt
    whole_words: bool = True  # options are looked for as whole words


def find_tasks(name: str) -> list[Task]:
    """--task: one of the names here, or a folder of your own. truthfulqa is two, its folds."""
    from lofit.tasks import own, truthfulqa

    if name == "truthfulqa":
        return truthfulqa.FOLDS
    tasks = named_tasks()
    if name in tasks:
        return [tasks[name]]
    if not Path(name).is_dir():
        names = ", ".join(("truthfulqa", *tasks))
        raise InputError(f"--task {name}: neither one of {names} nor a folder with train.jsonl")
    return [own.own_task(Path(name))]


def named_tasks() -> dict[str, Task]:
    """The tasks with a name of their own; all others are folders."""
    from lofit.tasks import clutrr, mquake, own, truthfulqa

    return {task.name: task for task in (mquake.TASK, clutrr.TASK, *truthfulqa.FOLDS)} | own.NAMED


def main_metric(name: str) -> str:
    """The metric to judge a task by."""
    return find_tasks(name)[0].metrics[0]


def check_texts(*texts: object) -> None:
    """Raise TypeError unless each is a text with something in it."""
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"expected a text, found {text!r}")


def folded(text: str) -> str:
    """A text as answers are compared: lower case, and accents in one of their two spellings."""
    return unicodedata.normalize("NFC", text).lower()


def first_option(text: str, options: tuple[str, ...], whole_words: bool = True) -> str | None:
    """The option, without outer white space, that occurs first in a text; the longest of several
    in one place. None if there is none. Case counts.

    whole_words: "B" is not in "Both". False is the rule of LLM-Adapters' evaluation.
    """
    names = sorted({option.strip() for option in options}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    found = re.search(rf"(?<!\w)(?:{pattern})(?!\w)" if whole_words else pattern, text)
    return found and found.group()


def last_number(text: str) -> float | None:
    """The last number in a text, commas removed; None if there is none."""
    numbers = re.findall(r"-?(?:(?<![\w.])\.)?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None
