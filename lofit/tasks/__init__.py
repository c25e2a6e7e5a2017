"""Tasks: a module reads its splits, writes prompts and scores predictions. It knows no model.

It has FOLDER, MAX_NEW_TOKENS, METRICS, MAIN_METRIC and the functions read, extract, score.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One item: train on prompt + answer; a prediction is right if it is one of the references."""

    prompt: str
    answer: str
    references: tuple[str, ...]
    outdated: tuple[str, ...] = ()  # what was true before the edit (MQuAKE)
