"""Tasks: a module reads its splits, writes prompts and scores predictions. It knows no model.

Every task has FOLDS, METRICS, MAIN_METRIC, path(data, split, fold) and read(data, split, seed,
fold); a module also has
ask(text), which makes a prompt of what a person asks. A task that is evaluated by generation has
MAX_NEW_TOKENS, STOP (a character after which nothing counts, or None), extract and score; one that
is evaluated by the probabilities of given answers has score_choices. A task may be both.
"""

import re
from dataclasses import dataclass


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

    @property
    def generated(self) -> bool:
        """Whether it is evaluated by generation; by given answers if there are `right` ones."""
        return bool(self.references) or not self.right


def check_texts(*texts: object) -> None:
    """Raise TypeError unless each is a non-empty string."""
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"expected a text, found {text!r}")


def first_option(text: str, options: tuple[str, ...]) -> str | None:
    """The option, without outer white space, that occurs first in a text; the longest of several
    in one place. None if there is none. As LLM-Adapters' evaluation: case counts, and an option may
    be a part of a word."""
    names = sorted({option.strip() for option in options}, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), text)
    return found and found.group()


def last_number(text: str) -> float | None:
    """The last number in a text, commas removed; None if there is none."""
    numbers = re.findall(r"-?(?:(?<![\w.])\.)?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None
