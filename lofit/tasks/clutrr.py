"""CLUTRR (kinship reasoning), in the paper's protocol: a family story, then how two of its people
are related. Reads DATA/clutrr/{train,val,test}.json."""

import ast
import random
import re
from collections import Counter
from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_json_list, reading
from lofit.tasks import Example, Task, check_texts, folded

N_TRAIN = 300  # stories to train on, sampled by the seed (paper, section 4)


def prompt(story: str, a: str, b: str) -> str:
    """The paper's prompt: a story without brackets, then how b is related to a.

    The public code cuts `query` at the comma and leaves the space before b, so every prompt has
    two spaces there; they are part of the protocol. A line break follows, then the relation.
    """
    return (
        f'Read the following story about a family. "{story}" Assume the relations described in the'
        " story are all true. Based on relations between the fictional characters in the story"
        " (assume the relations are all true) and your commonsense knowledge about family"
        f" relationship, how is  {b} related to {a}? Answer:  {b} is {a} 's\n"
    )


def ask(text: str) -> str:
    """The prompt of a story followed by the question. InputError if there is no question."""
    found = re.fullmatch(r"(.+?)\s*How is (\w+) related to (\w+)\?", text, re.I | re.S)
    if not found:
        raise InputError(f"{text!r}: expected a story followed by `How is B related to A?`")
    story, b, a = found.groups()
    return prompt(story, a, b)


def read(path: Path, split: str, seed: int) -> list[Example]:
    """The examples of a split's file; of `train` a sample. InputError that names file and item."""
    examples, last = [], most_frequent(path.with_name("train.json"))
    for where, item in read_json_list(path):
        with reading(f"{where}: not a CLUTRR story"):
            story = item["clean_story"].replace("[", "").replace("]", "")
            try:
                a, b = ast.literal_eval(item["query"])
            except SyntaxError:
                raise ValueError(f"'query' is {item['query']!r}") from None
            relation = item["target_text"]
            check_texts(story, a, b, relation)
        examples.append(
            Example(
                prompt(story, a, b), relation, references=(relation,), where=where,
                rules=(("the last edge", last.get(_last_edge(item), "")),),
                # stories of one chain of relations have one answer, and are right or wrong together
                unit=str(item.get("edge_types", "")),
            )
        )  # fmt: skip
    if split == "train" and len(examples) > N_TRAIN:
        examples = random.Random(seed).sample(examples, N_TRAIN)
    return examples


def most_frequent(path: Path) -> dict[str, str]:
    """The most frequent answer for each relation that a training story ends with: a cheap rule."""
    if not path.exists():
        return {}
    counts: dict[str, Counter] = {}
    for _, item in read_json_list(path):
        counts.setdefault(_last_edge(item), Counter())[str(item.get("target_text"))] += 1
    return {edge: answers.most_common(1)[0][0] for edge, answers in counts.items()}


def _last_edge(item: dict) -> str:
    """ "['sister', 'grandfather']" -> "grandfather"."""
    return str(item.get("edge_types", "")).rpartition(",")[2].strip(" '\"[]")


def extract(example: Example, continuation: str) -> str:
    """The prediction: what follows the prompt, up to a period, without outer white space."""
    return continuation.partition(".")[0].strip()


def score(prediction: str, example: Example) -> dict[str, float]:
    """em: equals the relation, lower case."""
    return {"em": float(folded(prediction) == folded(example.references[0]))}


TASK = Task(
    "clutrr",
    lambda data, split: data / "clutrr" / f"{split}.json",
    read,
    ("em",),
    max_length=400,
    stop=".",
    extract=extract,
    score=score,
    ask=ask,
)
