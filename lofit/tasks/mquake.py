"""MQuAKE (knowledge edits), in the paper's protocol: the prompt states an edit, the answer is what
would then be true. Reads DATA/MQuAKE/{train,val,test}.jsonl."""

from pathlib import Path

from lofit.files import read_jsonl, reading
from lofit.tasks import Example, Task, check_texts, folded


def prompt(edit: str, question: str) -> str:
    """No space follows `A:`, neither here nor in front of the answer that training appends."""
    return f"Q: Imagine that {edit}. {question} A:"


def ask(text: str) -> str:
    """The prompt of a question, or of an edit ("Imagine that ... .") and a question."""
    return f"Q: {text} A:"


def read(path: Path, split: str, seed: int) -> list[Example]:
    """The examples of a split's file. Raises InputError that names file, line and key."""
    examples = []
    for where, case in read_jsonl(path):
        with reading(f"{where}: not a MQuAKE case"):
            rewrite, question = case["requested_rewrite"][0], case["questions"][0]  # 1st of three
            target = rewrite["target_new"]["str"]
            new = [case["new_answer"]] + case["new_answer_alias"]
            old = [case["answer"]] + case["answer_alias"]
            check_texts(rewrite["prompt"], rewrite["subject"], target, question, *new, *old)
        statement = rewrite["prompt"].replace("{}", rewrite["subject"])
        edit = f"{statement} {target}"
        # a third of the answers is the edit's own object, which a model that copies it gets right
        copied = folded(target) in map(folded, new)
        examples.append(
            Example(
                prompt(edit, question), new[0], references=tuple(new), outdated=tuple(old),
                group="copied" if copied else "second hop", unit=edit,
                rules=(("copying the edit", target),), where=where,
            )
        )  # fmt: skip
    return examples


def extract(example: Example, continuation: str) -> str:
    """The prediction: what follows the last `A:` of the whole text, up to a line break."""
    return (example.prompt + continuation).rpartition("A:")[2].partition("\n")[0]


def score(prediction: str, example: Example) -> dict[str, float]:
    """em: equals the new answer or an alias, lower case, as the public code compares (a leading
    space counts as wrong); em_stripped: without outer white space; old_answer: stripped, equals
    what was true before the edit."""
    given, right = folded(prediction), [folded(r) for r in example.references]
    return {
        "em_stripped": float(given.strip() in right),
        "em": float(given in right),
        "old_answer": float(given.strip() in [folded(r) for r in example.outdated]),
    }


TASK = Task(
    "mquake",
    lambda data, split: data / "MQuAKE" / f"{split}.jsonl",
    read,
    ("em_stripped", "em", "old_answer"),
    max_length=400,
    extract=extract,  # no `stop`: a later `A:` would count
    score=score,
    ask=ask,
)
