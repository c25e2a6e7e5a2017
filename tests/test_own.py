"""A task of one's own: its five forms, data as people really have it, and bad lines named with
file, line and key."""

import json
from unicodedata import normalize

import pytest
from conftest import MINI_GEMMA

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.evaluation import evaluate
from lofit.llm.batches import collate, encode_example
from lofit.llm.scoring import target_losses
from lofit.run.setup import make_objective, open_runs
from lofit.tasks import first_option
from lofit.tasks.own import NAMED, own_task

FORMS = {
    "answer": {"prompt": "Q: What is the capital of it? A:", "answer": "city", "aliases": ["the"]},
    "option": {"prompt": "Q: Is it? A:", "answer": "city", "choices": ["country", "city"]},
    "number": {"prompt": "Q: What is it? A:", "answer": "1 + 1 = 2", "value": 2},
    "preference": {"prompt": "Q: Who is it? A:", "chosen": "capital", "rejected": "city"},
    "choice": {"prompt": "Q: Is it? A:", "choices": ["city", "country", "the sport"], "label": 1},
}
SPLITS = ("train", "val", "test")


def write(folder, lines, splits=SPLITS, end="\n", start=b""):
    folder.mkdir(exist_ok=True)
    for split in splits:
        text = "".join(json.dumps(line) + end for line in lines)
        (folder / f"{split}.jsonl").write_bytes(start + text.encode())
    return folder


@pytest.fixture
def task(tmp_path):
    """task(lines...): the task and its examples."""

    def make(*lines, **how):
        found = own_task(write(tmp_path / "mine", lines, **how))
        return found, found.read(found.file(None, "test"), "test", 42)

    return make


@pytest.fixture
def flags(tiny_folder, tmp_path):
    return ["--model", str(tiny_folder), "--task", str(tmp_path / "mine"), "--run",
            str(tmp_path / "run"), "--dtype", "float32"]  # fmt: skip


def em(found, example, continuation):
    return next(iter(found.score(found.extract(example, continuation), example).values()))


ANSWERS = [  # keys, what is generated, exact match
    *(({}, text, right) for text, right in (
        ("city", 1), (" City \nand more", 1), ("\n the", 1), ("cities", 0), ("", 0), ("A: city", 0),
    )),
    # of several lines: only the first line counted, so that the answer itself scored 0
    *(({"answer": answer}, text, right) for answer in ("one\ntwo", "\none\n\ntwo\n")
      for text, right in (
          (answer, 1), (f"{answer}\nand more", 1), ("one", 0), ("one\nthree", 0),
          ("the\nthen more", 1),  # the alias has one line
      )),
    # accents in two spellings
    *(({"answer": normalize(form, "Bogotá")}, normalize(other, "bogotá"), 1)
      for form, other in (("NFC", "NFD"), ("NFD", "NFC"))),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "continuation", "right"), ANSWERS)
def test_an_answer(task, keys, continuation, right):
    found, (example,) = task(FORMS["answer"] | keys)
    assert (example.prompt, example.answer) == tuple((FORMS["answer"] | keys).values())[:2]
    assert example.rejected is None and not example.right and found.metrics == ("em",)
    assert em(found, example, continuation) == right


def test_an_option_is_the_first_that_occurs_in_what_is_generated(task):
    line = {"prompt": "Q:", "answer": " answer2", "choices": [" answer1", " answer2", " answer10"]}
    found, (example,) = task(line)
    assert (found.metrics, found.max_new_tokens) == (("em", "accuracy"), 32)
    assert example.generated and example.right == (" answer2",)
    assert example.wrong == (" answer1", " answer10")
    for continuation, right in (
        (" answer2", 1), ("\n\nthe correct answer is answer2, not answer1", 1), ("", 0), ("2", 0),
        (" answer1 or answer2", 0), ("Answer2", 0), ("answer10 answer2", 0), ("answer20", 0),
    ):  # fmt: skip
        assert em(found, example, continuation) == right
    # the rule of LLM-Adapters, whose tasks have names
    assert NAMED["siqa"].score("answer20", example)["em"] == 1
    assert found.score_choices([-1.0], [-2.0, -3.0]) == {"accuracy": 1}


@pytest.mark.parametrize(
    ("choices", "answer", "said", "given"),
    [
        (["A", "B"], "B", "Answer: B", "B"),
        (["A", "B"], "B", "Both? A", "A"),
        (["yes", "no"], "yes", "I know it: yes", "yes"),
        (["yes", "no"], "yes", "not now", None),
        ([" New York", " New York City"], " New York", "in New York City", "New York City"),
        (["true", "false"], "false", "untrue, false", "false"),
        (["(A)", "(B)"], "(B)", "It is (B).", "(B)"),
        (["C", "C++"], "C++", "In C++, sure", "C++"),
        (["über", "unter"], "über", "darüber: unter", "unter"),
    ],
)
def test_options_are_whole_words(task, choices, answer, said, given):
    found, (example,) = task({"prompt": "Q:", "answer": answer, "choices": choices})
    assert first_option(said, tuple(choices)) == given
    assert em(found, example, said) == (given == answer.strip())


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("( 76 - 25 ) = 51", 51, 1), ("51 dollars, 3 packs", 51, 0), ("so it is -5.", -5, 1),
        ("so it is 5", -5, 0), ("1,234,567", 1234567, 1), ("#### 1,200", 1200, 1), ("7.0", 7, 1),
        ("3.0009", 3, 1), ("3.0011", 3, 0), ("fifty-one", 51, 0), ("", 0, 0), ("9" * 999, 51, 0),
        (".5", 0.5, 1), ("-.5", -0.5, 1), ("wait...72", 72, 1), ("10-5", -5, 1),
    ],
)  # fmt: skip
def test_a_number_is_the_last_one_generated(task, text, value, right):
    found, (example,) = task({"prompt": "Q:", "answer": " 2 + 2 = 4", "value": value})
    assert example.generated and (found.metrics, found.max_new_tokens) == (("accuracy",), 256)
    assert em(found, example, f"\nOf 3,\n{text}\n" if text else "") == right


def test_preferences_and_choices(task):
    found, (example,) = task(FORMS["preference"])
    assert (example.answer, example.rejected) == ("capital", "city")
    assert (example.right, example.wrong) == (("capital",), ("city",))
    assert found.score_choices([-1.0], [-2.0]) == {"accuracy": 1}
    assert found.score_choices([-2.0], [-1.0]) == {"accuracy": 0}
    found, (example,) = task(FORMS["choice"])
    assert example.answer == "country" and example.rejected is None and not example.generated
    assert (example.right, example.wrong) == (("country",), ("city", "the sport"))
    assert found.score_choices([-2.0], [-3.0, -1.0]) == {"accuracy": 0}


def test_files_of_other_systems(task):
    """CRLF, a byte-order mark, blank lines, characters that end a line elsewhere; and columns of
    null, as pandas and Dataset.to_json write a table whose rows have different keys."""
    text = "Zürich\u2028東京 🙂 \x0b"
    nulls = dict.fromkeys(("aliases", "choices", "label", "value", "chosen", "rejected", "group"))
    lines = [
        FORMS["answer"] | {"answer": text, "extra": 1},
        nulls | {"prompt": "Q:", "answer": "a"},
    ]
    _, found = task(*lines, end="\r\n\r\n", start=b"\xef\xbb\xbf")
    assert [e.references for e in found] == [(text, "the"), ("a",)] and found[1].group == ""
    assert found[1].where.endswith("test.jsonl, line 3")
    _, (example,) = task(nulls | FORMS["choice"])
    assert example.answer == "country"


BAD = [
    ("answer", {"answer": 3}, "key 'answer': expected a text, found 3"),
    ("answer", {"prompt": " "}, "key 'prompt': expected a text, found ' '"),
    ("answer", {"aliases": "city"}, "key 'aliases': expected a list"),
    ("answer", {"aliases": [""]}, "expected a text, found ''"),
    ("answer", {"answer": None}, "key 'answer' is missing"),
    ("answer", {"group": 3}, "key 'group': expected a text, found 3"),
    ("answer", {"group": ""}, "key 'group': expected a text, found ''"),
    ("answer", {"rule": 3}, "key 'rule': expected a text, found 3"),
    ("choice", {"rule": "city"}, "key 'rule' does not stand beside prompt, choices, label"),
    ("number", {"value": None}, "key 'value' is missing"),
    ("number", {"choices": ["1 + 1 = 2", "3"]}, "expected the keys of one form"),
    ("option", {"answer": "town"}, "key 'answer': expected one of the choices, found"),
    ("option", {"choices": ["city"] * 2}, "key 'choices': expected different texts"),
    ("option", {"aliases": ["city"]}, "key 'aliases' stands only beside prompt, answer"),
    ("option", {"choices": "city"}, "key 'choices': expected a list of at least"),
    ("number", {"value": "2"}, "key 'value': expected a number up to 1e15, found '2'"),
    ("number", {"value": True}, "key 'value': expected a number up to 1e15"),
    ("number", {"value": float("nan")}, "key 'value': expected a number up to 1e15"),
    ("number", {"value": 10**400}, "key 'value': expected a number up to 1e15|not valid JSON"),
    ("preference", {"rejected": ""}, "key 'rejected': expected a text"),
    ("preference", {"rejected": "capital"}, "chosen and rejected are the same, 'capital'"),
    ("choice", {"choices": ["one"]}, "key 'choices': expected a list of at least two"),
    ("choice", {"choices": [" a", "a"], "label": 0}, "key 'choices': expected different"),
    ("choice", {"label": 3}, "key 'label': expected 0 to 2, found 3"),
    ("choice", {"label": "1"}, "key 'label': expected 0 to 2, found '1'"),
    ("choice", {"label": True}, "key 'label': expected 0 to 2, found True"),
    ("choice", {"label": None}, "key 'label' is missing"),
]


@pytest.mark.parametrize(("form", "line", "message"), BAD)
def test_a_bad_line_is_named(task, form, line, message):
    with pytest.raises(InputError, match=f"test.jsonl, line 2: .*({message})"):
        task(FORMS[form], FORMS[form] | line)


@pytest.mark.parametrize(
    ("lines", "message"),
    [*(([line], "line 1: expected the keys of one form") for line in (
        {"prompt": "Q:"}, {"question": "?"}, FORMS["answer"] | FORMS["choice"],
        FORMS["option"] | FORMS["number"], FORMS["option"] | {"label": 0})),
     # a test split of numbers would be scored by exact match
     ([{"prompt": "Q:", "answer": " 4"}, {"prompt": "Q:", "answer": " 4", "value": 4}],
      "line 2: has the keys prompt, answer, value; expected prompt, answer, as in")],
)  # fmt: skip
def test_lines_of_no_form_or_of_two_are_refused(task, lines, message):
    with pytest.raises(InputError, match=f"jsonl, {message}"):
        task(*lines)


def test_no_such_task(tiny_folder, tmp_path):
    argv = ["--model", str(tiny_folder), "--run", str(tmp_path / "run"), "--data", str(tmp_path)]
    (tmp_path / "empty").mkdir()
    for task, message in (
        (str(tmp_path / "nowhere"), "neither one of truthfulqa, mquake, .* nor a folder"),
        (str(tmp_path / "empty"), "train.jsonl: no such file"),
        ("boolq", "boolq: no such folder; `python -m data.download boolq`"),
        ("listops", "listops: no such folder; `python -m data.listops`"),
    ):
        with pytest.raises(InputError, match=message):
            select_heads.main([*argv, "--task", task])


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "number"])
def test_every_form_runs_the_whole_way_through(flags, tmp_path, form, capsys):
    write(tmp_path / "mine", [FORMS[form]] * 6)  # the same prompt six times over
    select_heads.main([*flags, "--epochs", "1", "--heads", "4"])
    train.main([*flags, "--epochs", "60", "--lr", "0.5"])
    eval_script.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"] == "mine" and results["n"] == 6
    metrics = {"answer": ["em"], "option": ["em", "accuracy"]}.get(form, ["accuracy"])
    assert list(results["scores"]["tuned"]) == metrics
    assert set(results["scores"]["tuned"].values()) == {1}  # the same line, learnt by heart
    assert f"val {metrics[0]} 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["choice", "preference"])
def test_of_two_answers_one_of_which_begins_the_other_either_can_win(flags, tmp_path, form):
    """The end of the text counts, as in training: without it the longer one, a product of more
    factors, is never the more probable. Other answers are scored as before, without it."""
    short, long = " the capital", " the capital of the country"
    for other, counts in ((long, 1), (" of the country", 0)):
        own = {"choices": [short, other], "label": 1}
        own = own if form == "choice" else {"chosen": other, "rejected": short}
        write(tmp_path / "mine", [{"prompt": "Q: Is it? A:"} | own])
        with open_runs(train.parse_args(flags), "train") as runs:
            run = next(runs)
            (example,) = examples = run.read("test")
            assert example.ambiguous == bool(counts)
            found = evaluate(run, examples, 64, "")[0]["log_probs"]
            prompt, tokenizer = example.prompt, run.tokenizer
            n = len(tokenizer.encode(prompt + other)) - len(tokenizer.encode(prompt))
            text = encode_example(tokenizer, prompt, other)
            losses = target_losses(run.model, collate([text], "cpu"))[: n + counts]
            assert found["right"] == [pytest.approx(-losses.sum().item(), rel=1e-5)]


def test_groups_and_answers_are_reported(flags, tmp_path, capsys):
    lines = [FORMS["option"] | {"group": f"depth {d}"} for d in (10, 2, 2)]
    lines += [FORMS["option"] | {"answer": "country"}] * 2
    write(tmp_path / "mine", lines)
    eval_script.main([*flags, "--base-only"])
    results = json.loads((tmp_path / "run" / "results-base.json").read_text())
    assert results["always"] == {"answer": "city", "share": 0.6}
    given = results["given"]["base"]
    assert list(given) == ["city", "country", "other"] and sum(given.values()) == 5
    groups = results["groups"]
    assert [(g, means["n"]) for g, means in groups.items()] == [
        ("", 2), ("depth 2", 2), ("depth 10", 1)
    ]  # fmt: skip
    for metric in ("em", "accuracy"):
        total = sum(means["n"] * means["base"][metric] for means in groups.values())
        assert total / 5 == pytest.approx(results["scores"]["base"][metric])
    printed = capsys.readouterr().out
    assert "always 'city' would score 60.0%" in printed and "depth 10 (1 items)" in printed


def test_a_cheap_rule_is_scored(flags, tmp_path, capsys):
    """A line without its answer counts as wrong."""
    lines = [FORMS["answer"] | {"rule": rule} for rule in ("city", " City ", "country", None)]
    write(tmp_path / "mine", lines)
    eval_script.main([*flags, "--base-only"])
    results = json.loads((tmp_path / "run" / "results-base.json").read_text())
    assert results["rules"] == {"the cheap rule": 0.5}
    assert results["rule_scores"] == {"the cheap rule": [1, 1, 0, 0]}
    assert "the cheap rule would score 50.0%" in capsys.readouterr().out


def test_a_rule_is_read_as_an_answer_is(flags, tmp_path):
    """An answer may begin with a line break, which generated ones are compared without."""
    lines = [FORMS["answer"] | {"answer": f"\n{a}", "rule": "\ncity"} for a in ("city", "country")]
    write(tmp_path / "mine", lines)
    eval_script.main([*flags, "--base-only"])
    results = json.loads((tmp_path / "run" / "results-base.json").read_text())
    assert (
        results["rules"]
        == {"the cheap rule": results["always"]["share"]}
        == {"the cheap rule": 0.5}
    )


def test_a_prompt_that_ends_inside_a_token_is_warned_of(flags, tmp_path, capsys):
    """With the miniature's words a space at the end is nothing; with mini-gemma's it is."""
    good, bad = ({"prompt": f"Q: Is it? A:{end}", "answer": "city"} for end in ("", " "))
    write(tmp_path / "mine", [good, bad, bad], ["train"])
    write(tmp_path / "mine", [good], ["val"])
    with open_runs(train.parse_args([*flags, "--model", str(MINI_GEMMA)]), "train") as runs:
        run = next(runs)
        make_objective(run, run.read("train"), "train")
        err = capsys.readouterr().err
        assert "train.jsonl, line 2 and 1 more: the prompt ends inside a token" in err
        make_objective(run, run.read("val"), "val")
        assert "inside a token" not in capsys.readouterr().err
