"""Your own task: a folder with train.jsonl, val.jsonl and test.jsonl, in one of five forms.

    {"prompt", "answer", "aliases"?}   cross-entropy; em: what is generated equals the answer
    {"prompt", "answer", "choices"}    cross-entropy; em: the answer is the first of the choices in
                                       what is generated; accuracy: it is the most probable one
    {"prompt", "answer", "value"}      cross-entropy; accuracy: the last number generated is value
    {"prompt", "chosen", "rejected"}   DPO; accuracy: chosen is more probable than rejected
    {"prompt", "choices", "label"}     cross-entropy on choices[label]; accuracy: it is the most
                                       probable one

An answer follows its prompt as it stands: write the space or line break between them, if there is
to be one, at the start of the answer. A line may have a "group", a text: eval.py also reports the
scores of each group. NAMED are such tasks with a name: their folder is DATA/<name>.
"""

from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_jsonl
from lofit.tasks import Example, check_texts, first_option, last_number

FORMS = {
    ("prompt", "answer"): "answer",
    ("prompt", "answer", "choices"): "option",
    ("prompt", "answer", "value"): "number",
    ("prompt", "chosen", "rejected"): "preference",
    ("prompt", "choices", "label"): "choice",
}
METRICS = {"answer": ("em",), "option": ("em", "accuracy")}
NEW_TOKENS = {"number": 256}  # a solution in steps (LLM-Adapters: 256; answers and options: 32)
CLOSE = 0.001  # how far a number may be from the right one (LLM-Adapters)
MAX_VALUE = 1e15  # which a float holds exactly


class OwnTask:
    """The same interface as the modules beside it, for the files of a folder."""

    FOLDS = None
    STOP = None  # the prediction may follow empty lines, see `extract`

    def __init__(self, folder: Path | None, name: str = "", form: str | None = None):
        """The first line of the folder's train.jsonl shows its form. A task of NAMED has no folder
        of its own, but a name and a form. Raises InputError."""
        self.folder, self.name = folder, name
        self.form = form or _form_of(*next(read_jsonl(folder / "train.jsonl")))
        self.METRICS = METRICS.get(self.form, ("accuracy",))
        self.MAIN_METRIC = self.METRICS[0]
        self.MAX_NEW_TOKENS = NEW_TOKENS.get(self.form, 32)

    def path(self, data: Path, split: str, fold: int | None = None) -> Path:
        """The file of a split; only a task of NAMED looks into `data`."""
        return (self.folder or data / self.name) / f"{split}.jsonl"

    def read(
        self, data: Path, split: str, seed: int = 42, fold: int | None = None
    ) -> list[Example]:
        """The examples of a split. InputError with file, line and key."""
        path = self.path(data, split)
        if not (folder := path.parent).is_dir():
            script = "listops" if self.name == "listops" else f"download {self.name}"
            raise InputError(
                f"{folder}: no such folder; `python -m data.{script}` writes data/real/{self.name},"
                " and --data data/real reads it"
            )
        examples = []
        for where, line in read_jsonl(path):
            try:
                examples.append(getattr(self, f"_{self.form}")(line))
            except KeyError as error:
                raise InputError(f"{where}: key {error} is missing") from None
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}: {error}") from None
            if (form := _form_of(where, line)) != self.form:
                keys = f"{_keys(self.form)}, as in the first line of train.jsonl"
                raise InputError(f"{where}: has the keys {_keys(form)}; expected {keys}")
        return examples

    def _answer(self, line: dict) -> Example:
        prompt, answer = _text(line, "prompt"), _text(line, "answer")
        aliases = line.get("aliases", [])
        if not isinstance(aliases, list):
            raise TypeError("key 'aliases': expected a list of texts")
        check_texts(*aliases)
        return Example(prompt, answer, references=(answer, *aliases), group=_group(line))

    def _option(self, line: dict) -> Example:
        prompt, answer, choices = _text(line, "prompt"), _text(line, "answer"), _choices(line)
        if answer not in choices:
            raise ValueError(f"key 'answer': expected one of the choices, found {answer!r}")
        wrong = tuple(choice for choice in choices if choice != answer)
        return Example(
            prompt, answer, references=(answer,), question=prompt, right=(answer,), wrong=wrong,
            group=_group(line),
        )  # fmt: skip

    def _number(self, line: dict) -> Example:
        prompt, answer, value = _text(line, "prompt"), _text(line, "answer"), line["value"]
        if type(value) not in (int, float) or not abs(value) <= MAX_VALUE:
            raise TypeError(f"key 'value': expected a number up to 1e15, found {value!r}")
        return Example(prompt, answer, value=value, group=_group(line))

    def _preference(self, line: dict) -> Example:
        prompt, chosen, rejected = (_text(line, k) for k in ("prompt", "chosen", "rejected"))
        return Example(
            prompt, chosen, rejected, question=prompt, right=(chosen,), wrong=(rejected,),
            group=_group(line),
        )  # fmt: skip

    def _choice(self, line: dict) -> Example:
        prompt, choices, label = _text(line, "prompt"), _choices(line), line["label"]
        if type(label) is not int or not 0 <= label < len(choices):  # true is no 1
            raise ValueError(f"key 'label': expected 0 to {len(choices) - 1}, found {label!r}")
        wrong = tuple(choice for i, choice in enumerate(choices) if i != label)
        answer = choices[label]
        return Example(
            prompt, answer, question=prompt, right=(answer,), wrong=wrong, group=_group(line)
        )

    def extract(self, prompt: str, continuation: str) -> str:
        """The prediction, without outer white space: of an answer the first line with something in
        it; an option or a number may stand anywhere."""
        text = continuation.strip()
        return text.partition("\n")[0].strip() if self.form == "answer" else text

    def score(self, prediction: str, example: Example) -> dict[str, float]:
        """em or accuracy, see above; an answer's em leaves case and outer white space out."""
        if self.form == "number":
            found = last_number(prediction)
            return {"accuracy": float(found is not None and abs(found - example.value) <= CLOSE)}
        if self.form == "option":
            given = first_option(prediction, (*example.right, *example.wrong))
            return {"em": float(given == example.answer.strip())}
        right = [reference.strip().lower() for reference in example.references]
        return {"em": float(prediction.lower() in right)}

    def score_choices(self, right: list[float], wrong: list[float]) -> dict[str, float]:
        """accuracy: the right answer's log-probability is the highest."""
        return {"accuracy": float(right[0] > max(wrong))}


def _form_of(where: str, line: dict) -> str:
    fits = [set(keys) for keys in FORMS if set(keys) <= line.keys()]
    fits = [keys for keys in fits if not any(keys < other for other in fits)]
    if len(fits) != 1:
        allowed = "; ".join(map(_keys, FORMS.values()))
        raise InputError(f"{where}: expected the keys of one form ({allowed})")
    form = next(form for keys, form in FORMS.items() if set(keys) == fits[0])
    if "aliases" in line and form != "answer":
        raise InputError(f"{where}: key 'aliases' stands only beside {_keys('answer')}")
    return form


def _keys(form: str) -> str:
    return next(", ".join(keys) for keys, name in FORMS.items() if name == form)


def _text(line: dict, key: str) -> str:
    if not isinstance(line[key], str) or not line[key].strip():
        raise TypeError(f"key {key!r}: expected a text, found {line[key]!r}")
    return line[key]


def _choices(line: dict) -> list[str]:
    choices = line["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise TypeError("key 'choices': expected a list of at least two texts")
    check_texts(*choices)
    if len({choice.strip() for choice in choices}) < len(choices):
        raise ValueError(f"key 'choices': expected different texts, found {choices!r}")
    return choices


def _group(line: dict) -> str:
    return _text(line, "group") if "group" in line else ""


NAMED = {
    name: OwnTask(None, name, form)
    for form, names in {
        "option": ("siqa", "arc_challenge", "boolq", "boolq_passage", "winogrande"),
        "number": ("svamp", "gsm8k"),
        "answer": ("listops",),
    }.items()
    for name in names
}
