"""Base and tuned answers side by side."""

import io
import sys

import pytest
from conftest import MINI, make_run

from lofit import load_tokenizer
from lofit.errors import InputError
from lofit.files import read_tensors, write_tensors
from lofit.heads import edits_off
from lofit.inspect import ask
from lofit.llm.generate import generate
from lofit.tasks import clutrr, mquake, truthfulqa

QUESTION = "What is the capital of Braviland?"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run", make_run(tmp_path / "run", MINI, scale=4.0, n=13)


def continuation(model, prompt, n=32):
    tokenizer = load_tokenizer(MINI)
    ids = tokenizer.encode(prompt)
    new = generate(model, [ids], n, tokenizer.eos_ids)[0]
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]


def test_both_models_answer_a_text_as_it_stands(run, capsys):
    folder, model = run
    ask.main([str(folder), f"Q: {QUESTION} A:", "--max-new-tokens", "5"])
    tuned = continuation(model, f"Q: {QUESTION} A:", 5)
    with edits_off(model):
        base = continuation(model, f"Q: {QUESTION} A:", 5)
    assert base != tuned
    assert capsys.readouterr().out == f"base   {base.strip()}\ntuned  {tuned.strip()}\n"


def test_the_task_s_prompt(run, capsys):
    folder, model = run
    ask.main([str(folder), "--task", QUESTION])
    tuned = continuation(model, f"Q: {QUESTION} A:").partition("\n")[0]
    assert capsys.readouterr().out.endswith(f"tuned  {tuned.strip()}\n")


def test_prompts_are_those_of_the_tasks():
    assert mquake.TASK.ask("Imagine that A is B. What is A?") == mquake.prompt(
        "A is B", "What is A?"
    )
    assert truthfulqa.FOLDS[0].ask("Is it?") == "Q: Is it? A:"
    story = "Ann has a son, Bob. Bob has a sister, Cid."
    assert clutrr.TASK.ask(f"{story} How is Cid related to Ann?") == clutrr.prompt(
        story, "Ann", "Cid"
    )
    with pytest.raises(InputError, match="expected a story followed by `How is B related to"):
        clutrr.TASK.ask("Who is Cid?")


def test_one_question_after_the_other_until_the_end(run, monkeypatch, capsys):
    folder, model = run
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n{'Braviland ' * 1100}\nWho?\n"))
    ask.main([str(folder), "--max-new-tokens", "3"])
    out, err = capsys.readouterr()
    assert [line[:5] for line in out.splitlines()] == ["base ", "tuned"] * 2
    assert err.startswith(
        "error: the question has "
    )  # too long: the next one is asked all the same


@pytest.mark.parametrize("task", ["fruits", "boolq"])
def test_other_tasks_have_no_prompt(run, task):
    folder, _ = run
    path = folder / "offsets.safetensors"
    tensors, info = read_tensors(path)
    write_tensors(path, tensors, info | {"task": task})
    with pytest.raises(InputError, match=rf"the run's task \({task}\) has no prompt; leave"):
        ask.main([str(folder), "--task", "Who?"])
