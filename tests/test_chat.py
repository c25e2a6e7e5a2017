"""Chat templates: what transformers makes of them, in training and evaluation alike."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MINI, REPO

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.llm.batches import encode_example
from lofit.llm.chat import load_chat_template
from lofit.llm.tokenizer import load_tokenizer

TEMPLATES = {  # in the manner of Llama 2, Llama 3 and Gemma; the words are the miniature's
    "llama 2": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[ city ] ' + m['content'] | trim + ' [ country ]' }}"
        "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{{- bos_token }}\n{%- for m in messages %}\n    {{- 'city ' + m['role'] + ' : ' }}\n"
        "    {{- m['content'] | trim + '</s>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- 'city country :' }}\n{%- endif %}\n"
    ),
    "no bos": "{% for m in messages %}city {{ m.content }} country\n{% endfor %}the",
}
TEXT = " Q: Who is the head of the country? A:"


@pytest.fixture
def chatty(tiny_folder):
    """Give the tiny folder a template; returns the folder."""

    def make(template, file="chat_template.jinja"):
        if file == "chat_template.jinja":
            (tiny_folder / file).write_text(template)
        else:
            settings = json.loads((MINI / file).read_text()) | {"chat_template": template}
            (tiny_folder / file).write_text(json.dumps(settings))
        return tiny_folder

    return make


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_ids_are_those_of_transformers(chatty, name, file):
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    folder = chatty(TEMPLATES[name], file)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATES[name],
    )  # fmt: skip
    want = theirs.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=False
    )
    tokenizer = load_tokenizer(folder, add_special_tokens=False)
    assert tokenizer.encode(load_chat_template(folder)(TEXT)) == want
    assert want.count(1) == (name != "no bos")


def test_a_list_of_named_templates(chatty):
    templates = [{"name": "tool", "template": "x"}, {"name": "default", "template": "city"}]
    assert load_chat_template(chatty(templates, "tokenizer_config.json"))(TEXT) == "city"


@pytest.mark.parametrize(
    "template", [[1], 5, {"default": "x"}, [{"name": "default", "template": 5}], True]
)
def test_a_template_of_a_wrong_type_is_refused(chatty, template):
    folder = chatty(template, "tokenizer_config.json")
    with pytest.raises(InputError, match="tokenizer_config.json: chat_template is .*a text, or a"):
        load_chat_template(folder)


SAME = [  # what public templates make use of
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}",
    "{%- for m in messages -%}\n{% generation -%}\n  {% set x = 1 %}{{ x }}{% endgeneration %}\n"
    "{{ x is defined }}{% endfor %}",
    "{{ {'b': 'é<', 'a': [1, 2]} | tojson }}",
    "{{ {'b': 'é<', 'a': [1, 2]} | tojson(ensure_ascii=True, indent=2, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ messages | tojson(true, 1) }}",
    "{{ tools is none }} {{ tools is not none }} {{ documents is none }} {{ tools is defined }}",
    "{% if tools is not none %}{{ tools | length }}{% endif %}{{ pad_token is defined }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}x",
    "{{ strftime_now('%Y') }}{{ messages[0]['content'] | trim }}{{ add_generation_prompt }}",
]


@pytest.mark.parametrize("template", SAME)
def test_what_templates_expect_to_find(chatty, template):
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    folder = chatty(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", chat_template=template
    )
    want = theirs.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, tokenize=False
    )
    assert load_chat_template(folder)(TEXT) == want


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        ("{{ '\\ud83d' }}", "Q:", "half a character"),
        ("{{ messages[0].content }}", "Q: \ud83d", "half a character"),
        ("{{ raise_exception('first\nsecond') }}", "Q:", "fails .first second"),
        ("{{ raise_exception('\\ud83d') }}", "Q:", "fails"),
        ("{% for\n\n%}", "Q:", "is malformed"),
    ],
)
def test_odd_texts_end_in_one_line(chatty, template, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load_chat_template(chatty(template))(text)
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()


@pytest.mark.slow
def test_the_renderer_takes_the_jinja2_of_its_parent(chatty, tmp_path):
    """Where it is the user's own, by PYTHONPATH, and not the one that Python finds by itself."""
    for package in ("jinja2", "markupsafe"):
        origin = Path(importlib.util.find_spec(package).origin).parent
        shutil.copytree(origin, tmp_path / "own" / package)
    with (tmp_path / "own" / "jinja2" / "__init__.py").open("a") as file:
        file.write("\nTemplateError.__str__ = lambda self: 'my own jinja2'\n")
    folder = chatty("{{ raise_exception('no') }}")
    code = f"from lofit.llm.chat import load_chat_template as t; t({str(folder)!r})('Q')"
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'own'}:{REPO}"}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "the chat template fails (my own jinja2)" in ended.stderr


NAMES = [  # tokenizer_config.json, special_tokens_map.json
    ({}, {"bos_token": "<s>"}),
    ({}, {"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False}}),
    ({"bos_token": "city"}, {"bos_token": "<s>"}),
    ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "city"}),
    ({"tokenizer_class": "LlamaTokenizerFast"}, {}),
    ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, {}),
]


@pytest.mark.parametrize(("settings", "beside"), NAMES)
def test_special_tokens_are_those_of_transformers(chatty, settings, beside):
    transformers = pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')
    folder = chatty("{{ bos_token }} and {{ eos_token }}")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(beside))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": TEXT}]
    assert load_chat_template(folder)(TEXT) == theirs.apply_chat_template(asked, tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat template is malformed"),
        ("{{ raise_exception('roles must alternate') }}", "fails .roles must alternate"),
        ("{{ messages.append(1) }}", "chat template fails"),
        ("{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}", "chat template fails"),
    ],
)
def test_bad_and_wicked_templates_are_refused(chatty, template, message):
    with pytest.raises(InputError, match=message):
        load_chat_template(chatty(template))(TEXT)


def test_a_model_without_template_is_refused(tiny_folder, tmp_path):
    shutil.copy(MINI / "tokenizer_config.json", tiny_folder)
    argv = ["--model", str(tiny_folder), "--chat", "--run", str(tmp_path / "run")]
    with pytest.raises(InputError, match="no chat template .*leave --chat out"):
        select_heads.main(argv)


def test_training_and_evaluation_ask_alike(chatty, small_data, tmp_path, monkeypatch):
    folder = chatty(TEMPLATES["llama 2"])
    run = ["--run", str(tmp_path / "run")]
    flags = ["--model", str(folder), "--data", str(small_data), *run, "--chat"]
    trained, asked = [], []
    monkeypatch.setattr(
        "lofit.objectives.encode_example",
        lambda tokenizer, prompt, answer: (
            trained.append(prompt) or encode_example(tokenizer, prompt, answer)
        ),
    )
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.3"])
    monkeypatch.setattr(
        "lofit.run.evaluation.generate_all",
        lambda model, prompts, *args: asked.extend(prompts) or [[5]] * len(prompts),
    )
    eval_run = [*flags[:4], "--run", str(tmp_path / "runs")]
    shutil.copytree(tmp_path / "run", tmp_path / "runs")
    eval_script.main([*eval_run, "--chat", "--split", "train"])
    tokenizer = load_tokenizer(folder, add_special_tokens=False)
    assert asked[:24] == [tokenizer.encode(prompt) for prompt in trained[:24]]
    assert all(p.startswith("<s>[ city ] Q: Imagine that") for p in trained)
    assert all(ids.count(1) == 1 for ids in asked)
    assert all(p.endswith("A: [ country ]") for p in trained)
    line = json.loads((tmp_path / "runs" / "predictions-train.jsonl").open().readline())
    assert line["prompt"].startswith("Q: Imagine") and "country" not in line["tuned"]["prediction"]
    with pytest.raises(
        InputError, match="offsets.safetensors: made for chat True, but this run is for chat False"
    ):
        eval_script.main(eval_run)


def test_given_answers_stand_behind_the_template_too(chatty, small_data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lofit.run.evaluation.score_answers",
        lambda model, tokenizer, questions, *args: (
            asked.extend(questions) or [[0.0, -1.0, -1.0] for _ in questions]
        ),
    )
    flags = ["--model", str(chatty(TEMPLATES["llama 2"])), "--data", str(small_data), "--chat"]
    run = ["--run", str(tmp_path / "run")]
    eval_script.main([*flags, *run, "--task", "truthfulqa", "--fold", "0", "--base-only"])
    assert len(asked) == 8
    for question, answers in asked:
        assert question.startswith("<s>[ city ] Interpret each") and question.endswith(
            "A: [ country ]"
        )
        assert all(answer.startswith(" ") for answer in answers)
