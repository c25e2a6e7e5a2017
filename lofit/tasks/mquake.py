"""MQuAKE (knowledge edits), in the paper's protocol: the prompt states an edit, the answer is what
would then be true. Reads DATA/MQuAKE/{train,val,test}.jsonl."""

from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_jsonl
from lofit.tasks import Example, check_texts

FOLDER = "MQuAKE"
FOLDS = None
MAX_NEW_TOKENS = 16
STOP = None  # a later `A:` would count, see `extract`
METRICS = ("em", "em_stripped", "old_answer")
MAIN_METRIC = "em_stripped"


def prompt(edit: str, question: str) -> str:
    """No space follows `A:`, neither here nor in front of the answer that training appends."""
    return f"Q: Imagine that {edit}. {question} A:"


def ask(text: str) -> str:
    """The prompt of a question, or of an edit ("Imagine that ... .") and a question."""
    return f"Q: {text} A:"


def path(data: Path, split: str, fold: int | None = None) -> Path:
    """The file of a split."""
    return data / FOLDER / f"{split}.jsonl"


def read(data: Path, split: str, seed: int = 42, fold: int | None = None) -> list[Example]:
    """The examples of a split. Raises InputError that names file, line and key."""
    examples = []
    for where, case in read_jsonl(path(data, split)):
        try:
            rewrite, question = case["requested_rewrite"][0], case["questions"][0]  # 1st of three
            target = rewrite["target_new"]["str"]
            new = [case["new_answer"]] + case["new_answer_alias"]
            old = [case["answer"]] + case["answer_alias"]
            check_texts(rewrite["prompt"], rewrite["subject"], target, question, *new, *old)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: not a MQuAKE case, missing or wrong: {error!r}") from None
        statement = rewrite["prompt"].replace("{}", rewrite["subject"])
        asked = prompt(f"{statement} {target}", question)
        examples.append(Example(asked, new[0], references=tuple(new), outdated=tuple(old)))
    return examples


def extract(prompt: str, continuation: str) -> str:
    """The prediction: what follows the last `A:` of the whole text, up to a line break."""
    return (prompt + continuation).rpartition("A:")[2].partition("\n")[0]


def score(prediction: str, example: Example) -> dict[str, float]:
    """em: equals the new answer or an alias, lower case, as the public code compares (a leading
    space counts as wrong); em_stripped: without outer white space; old_answer: stripped, equals
    what was true before the edit."""
    said, right = prediction.lower(), [r.lower() for r in example.references]
    return {
        "em": float(said in right),
        "em_stripped": float(said.strip() in right),
        "old_answer": float(said.strip() in [r.lower() for r in example.outdated]),
    }
