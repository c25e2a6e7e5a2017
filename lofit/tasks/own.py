"""Your own task: a folder with train.jsonl, val.jsonl and test.jsonl, lines in one form of three.

    {"prompt", "answer", "aliases"?}       cross-entropy; exact match of what is generated
    {"prompt", "chosen", "rejected"}       DPO; accuracy: chosen is more probable than rejected
    {"prompt", "choices", "label"}         cross-entropy on choices[label]; accuracy: it is the most
                                           probable (the form of ARC, BoolQ, WinoGrande)

An answer follows its prompt as it stands: write the space or line break between them, if there is
to be one, at the start of the answer.
"""

from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_jsonl
from lofit.tasks import Example, check_texts

FORMS = {
    ("prompt", "answer"): "answer",
    ("prompt", "chosen", "rejected"): "preference",
    ("prompt", "choices", "label"): "choice",
}


class OwnTask:
    """The same interface as the modules beside it, for the files of a folder."""

    FOLDS = None
    MAX_NEW_TOKENS = 32
    STOP = None  # the prediction may stand behind empty lines, see `extract`

    def __init__(self, folder: Path):
        """Tells the form by the first line of train.jsonl. Raises InputError."""
        self.folder = folder
        where, line = next(read_jsonl(folder / "train.jsonl"))
        forms = [form for keys, form in FORMS.items() if set(keys) <= line.keys()]
        if len(forms) != 1:
            allowed = "; ".join(", ".join(keys) for keys in FORMS)
            raise InputError(f"{where}: expected the keys of one form ({allowed})")
        self.form = forms[0]
        self.METRICS = ("em",) if self.form == "answer" else ("accuracy",)
        self.MAIN_METRIC = self.METRICS[0]

    def read(
        self, data: Path, split: str, seed: int = 42, fold: int | None = None
    ) -> list[Example]:
        """The examples of a split; `data` is not looked at. InputError with file, line and key."""
        examples = []
        for where, line in read_jsonl(self.folder / f"{split}.jsonl"):
            try:
                examples.append(getattr(self, f"_{self.form}")(line))
            except KeyError as error:
                raise InputError(f"{where}: key {error} is missing") from None
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: {error}") from None
        return examples

    def _answer(self, line: dict) -> Example:
        prompt, answer = _text(line, "prompt"), _text(line, "answer")
        aliases = line.get("aliases", [])
        if not isinstance(aliases, list):
            raise TypeError("key 'aliases': expected a list of texts")
        check_texts(*aliases)
        return Example(prompt, answer, references=(answer, *aliases))

    def _preference(self, line: dict) -> Example:
        prompt, chosen, rejected = (_text(line, k) for k in ("prompt", "chosen", "rejected"))
        return Example(
            prompt, chosen, rejected, question=prompt, right=(chosen,), wrong=(rejected,)
        )

    def _choice(self, line: dict) -> Example:
        prompt, choices, label = _text(line, "prompt"), line["choices"], line["label"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise TypeError("key 'choices': expected a list of at least two texts")
        check_texts(*choices)
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise ValueError(f"key 'label': expected 0 to {len(choices) - 1}, found {label!r}")
        wrong = tuple(choice for i, choice in enumerate(choices) if i != label)
        answer = choices[label]
        return Example(prompt, answer, question=prompt, right=(answer,), wrong=wrong)

    def extract(self, prompt: str, continuation: str) -> str:
        """The prediction: the first line with something in it, without outer white space."""
        return continuation.strip().partition("\n")[0].strip()

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """em: equals the answer or an alias, lower case, without outer white space."""
        right = [reference.strip().lower() for reference in example.references]
        return {"em": float(prediction.lower() in right)}

    def score_choices(self, right: list[float], wrong: list[float]) -> dict[str, float]:
        """accuracy: the right answer's log-probability is the highest."""
        return {"accuracy": float(right[0] > max(wrong))}


def _text(line: dict, key: str) -> str:
    if not isinstance(line[key], str) or not line[key].strip():
        raise TypeError(f"key {key!r}: expected a text, found {line[key]!r}")
    return line[key]
