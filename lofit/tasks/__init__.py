"""Tasks: a module reads its splits, writes prompts and scores predictions. It knows no model.

Every task has FOLDS, METRICS, MAIN_METRIC and read(data, split, seed, fold); a module also has
ask(text), which makes a prompt of what a person asks. A task that is evaluated by generation has
MAX_NEW_TOKENS, STOP (a character behind which nothing counts, or None), extract and score; one that
is evaluated by the probabilities of given answers has score_choices.
"""

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


def check_texts(*texts: object) -> None:
    """Raise TypeError unless each is a non-empty string."""
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"expected a text, found {text!r}")
