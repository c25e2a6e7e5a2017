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
scores of each group; and in the first three forms a "rule", the answer that a cheap rule of yours
would give: eval.py reports what it would score. A key that is null counts as absent. NAMED are such
tasks with a name: their folder is DATA/<name>.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lofit.errors import InputError
from lofit.files import read_jsonl, reading
from lofit.tasks import Example, Task, check_texts, first_option, folded, last_number

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


def own_task(folder: Path) -> Task:
    """A folder of your own as a task; the first line of train.jsonl shows its form."""
    first = next(read_jsonl(folder / "train.jsonl"), None)
    if first is None:
        raise InputError(f"{folder / 'train.jsonl'}: no examples in it")
    name, form = folder.resolve().name, _form_of(*first)
    return _task(name, form, lambda data, split: folder / f"{split}.jsonl")


def _task(name: str, form: str, file: Callable[[Path, str], Path], **more) -> Task:
    return Task(
        name,
        file,
        lambda path, split, seed: read(path, form, name),
        METRICS.get(form, ("accuracy",)),
        max_new_tokens=NEW_TOKENS.get(form, 32),
        extract=partial(extract, form),
        score=partial(score, form, more.get("whole_words", True)),
        score_choices=score_choices,
        **more,
    )


def read(path: Path, form: str, name: str) -> list[Example]:
    """The examples of a file. InputError with file, line and key."""
    if name in NAMED and not path.parent.is_dir():
        script = "listops" if name == "listops" else f"download {name}"
        raise InputError(
            f"{path.parent}: no such folder; `python -m data.{script}` writes data/real/{name}, and"
            " --data data/real reads it"
        )
    examples = []
    for where, line in read_jsonl(path):
        line = {key: value for key, value in line.items() if value is not None}
        with reading(where):
            more = {"group": _group(line), "rules": _rules(line, form), "where": where}
            examples.append(replace(EXAMPLE_OF[form](line), **more))
        if (other := _form_of(where, line)) != form:
            keys = f"{_keys(form)}, as in the first line of train.jsonl"
            raise InputError(f"{where}: has the keys {_keys(other)}; expected {keys}")
    return examples


def _answer(line: dict) -> Example:
    prompt, answer = _text(line, "prompt"), _text(line, "answer")
    aliases = line.get("aliases", [])
    if not isinstance(aliases, list):
        raise TypeError("key 'aliases': expected a list of texts")
    check_texts(*aliases)
    return Example(prompt, answer, references=(answer, *aliases))


def _option(line: dict) -> Example:
    prompt, answer, choices = _text(line, "prompt"), _text(line, "answer"), _choices(line)
    if answer not in choices:
        raise ValueError(f"key 'answer': expected one of the choices, found {answer!r}")
    wrong = tuple(choice for choice in choices if choice != answer)
    return Example(
        prompt, answer, references=(answer,), question=prompt, right=(answer,), wrong=wrong
    )


def _number(line: dict) -> Example:
    prompt, answer, value = _text(line, "prompt"), _text(line, "answer"), line["value"]
    if type(value) not in (int, float) or not abs(value) <= MAX_VALUE:
        raise TypeError(f"key 'value': expected a number up to 1e15, found {value!r}")
    return Example(prompt, answer, value=value)


def _preference(line: dict) -> Example:
    prompt, chosen, rejected = (_text(line, k) for k in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise ValueError(f"chosen and rejected are the same, {chosen!r}: nothing can be learned")
    return Example(prompt, chosen, rejected, question=prompt, right=(chosen,), wrong=(rejected,))


def _choice(line: dict) -> Example:
    prompt, choices, label = _text(line, "prompt"), _choices(line), line["label"]
    if type(label) is not int or not 0 <= label < len(choices):  # not isinstance: True is an int
        raise ValueError(f"key 'label': expected 0 to {len(choices) - 1}, found {label!r}")
    wrong = tuple(choice for i, choice in enumerate(choices) if i != label)
    answer = choices[label]
    return Example(prompt, answer, question=prompt, right=(answer,), wrong=wrong)


EXAMPLE_OF = {
    "answer": _answer, "option": _option, "number": _number, "preference": _preference,
    "choice": _choice,
}  # fmt: skip


def extract(form: str, example: Example, continuation: str) -> str:
    """The prediction, without outer white space: of an answer as many lines as the longest
    reference has; an option or a number may stand anywhere."""
    text = continuation.strip()
    if form != "answer":
        return text
    lines = max(reference.strip().count("\n") for reference in example.references) + 1
    return "\n".join(text.split("\n")[:lines]).strip()


def score(form: str, whole_words: bool, prediction: str, example: Example) -> dict[str, float]:
    """em or accuracy, see above; an answer's em leaves case and outer white space out."""
    if form == "number":
        found = last_number(prediction)
        return {"accuracy": float(found is not None and abs(found - example.value) <= CLOSE)}
    if form == "option":
        given = first_option(prediction, (*example.right, *example.wrong), whole_words)
        return {"em": float(given == example.answer.strip())}
    right = [folded(reference.strip()) for reference in example.references]
    lines = folded(prediction).split("\n")
    return {"em": float(any("\n".join(lines[: r.count("\n") + 1]).strip() == r for r in right))}


def score_choices(right: list[float], wrong: list[float]) -> dict[str, float]:
    """accuracy: the right answer's log-probability is the highest."""
    return {"accuracy": float(right[0] > max(wrong))}


def _form_of(where: str, line: dict) -> str:
    line = {key: value for key, value in line.items() if value is not None}  # as pandas writes it
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


def _rules(line: dict, form: str) -> tuple[tuple[str, str], ...]:
    if "rule" not in line:
        return ()
    if form in ("preference", "choice"):
        raise ValueError(f"key 'rule' does not stand beside {_keys(form)}")
    return (("the cheap rule", _text(line, "rule")),)


def _named(name: str, form: str) -> Task:
    """Options of these tasks are looked for as LLM-Adapters does, also inside words."""
    return _task(name, form, lambda data, split: data / name / f"{split}.jsonl", whole_words=False)


NAMED = {
    name: _named(name, form)
    for form, names in {
        "option": ("siqa", "arc_challenge", "boolq", "boolq_passage", "winogrande"),
        "number": ("svamp", "gsm8k"),
        "answer": ("listops",),
    }.items()
    for name in names
}
