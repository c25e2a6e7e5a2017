"""Chat templates: what transformers makes of them, in training and evaluation alike."""

import json
import shutil

import pytest
from conftest import MINI

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
ASKED = [{"role": "user", "content": TEXT}]


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
def test_ids_are_those_of_transformers(chatty, name, file, transformers):
    folder = chatty(TEMPLATES[name], file)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATES[name],
    )  # fmt: skip
    want = theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    wrap, end_of_turn = load_chat_template(folder)
    assert load_tokenizer(folder, end_of_turn).encode(wrap(TEXT)) == want
    assert want.count(1) == (name != "no bos")


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
def test_what_templates_expect_to_find(chatty, template, transformers):
    folder = chatty(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", chat_template=template
    )
    want = theirs.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert load_chat_template(folder)[0](TEXT) == want


NAMES = [  # tokenizer_config.json, special_tokens_map.json
    ({}, {"bos_token": "<s>"}),
    ({}, {"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False}}),
    ({"bos_token": "city"}, {"bos_token": "<s>"}),
    ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "city"}),
    ({"tokenizer_class": "LlamaTokenizerFast"}, {}),
    ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, {}),
]


@pytest.mark.parametrize(("settings", "beside"), NAMES)
def test_special_tokens_are_those_of_transformers(chatty, settings, beside, transformers):
    folder = chatty("{{ bos_token }} and no more")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(beside))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert load_chat_template(folder)[0](TEXT) == theirs.apply_chat_template(ASKED, tokenize=False)


ENDS = {  # a template, or templates with names -> what it writes after an answer
    "{% for m in messages %}{{ m.content }}</s>\n{% endfor %}": "</s>\n",
    "{% for m in messages %}{{ m.content }}{% endfor %}": "",
    TEMPLATES["llama 2"]: "",  # renders no answer, and may still ask
    "{{ messages[0].content }}": "",
}


@pytest.mark.parametrize("template", ENDS)
@pytest.mark.parametrize("named", [False, True])
def test_what_ends_an_answer(chatty, template, named):
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": template}]
    folder = chatty(several if named else template, "tokenizer_config.json")
    assert load_chat_template(folder)[1] == ENDS[template]


BAD = [  # a template, what the error says
    *((wrong, "tokenizer_config.json: .*malformed")
      for wrong in ([1], {"default": "x"}, [{"name": "default", "template": 5}], True, [{}])),
    ("{% for %}", "the chat template fails .TemplateSyntaxError"),
    ("{{ raise_exception('first\nsecond') }}", "fails .TemplateError: first second"),
    ("{{ raise_exception('\ud83d') }}", "fails"), ("{{ 1 // 0 }}", "fails .ZeroDivisionError"),
    ("{{ 'a' * 10**12 }}", "fails .MemoryError"), ("{{ range(10**9) | list }}", "fails .Overflow"),
    ("{{ messages | map('nope') | list }}", "fails"), ("{{ none.a.b }}", "fails .UndefinedError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails .RecursionError"),
    ("{{ messages.append(1) }}", "fails .SecurityError"),
    ("{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}", "fails .SecurityError"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "message"), BAD)
def test_bad_and_wicked_templates_are_refused(chatty, template, message):
    with pytest.raises(InputError, match=message):
        load_chat_template(chatty(template, "tokenizer_config.json"))[0](TEXT)


def test_a_model_without_template_is_refused(tiny_folder, tmp_path):
    shutil.copy(MINI / "tokenizer_config.json", tiny_folder)
    argv = ["--model", str(tiny_folder), "--chat", "--run", str(tmp_path / "run")]
    with pytest.raises(InputError, match="no chat template .*leave --chat out"):
        select_heads.main(argv)


def test_training_and_evaluation_ask_alike(chatty, small_data, tmp_path, monkeypatch):
    folder, run = chatty(TEMPLATES["llama 2"]), tmp_path / "run"
    flags = ["--model", str(folder), "--data", str(small_data), "--run", str(run), "--chat"]
    trained, asked = [], []
    monkeypatch.setattr(
        "lofit.objectives.encode_example",
        lambda tokenizer, prompt, answer: (
            trained.append(prompt) or encode_example(tokenizer, prompt, answer)
        ),
    )
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.3"])
    monkeypatch.setattr(
        "lofit.evaluation.generate_all",
        lambda model, prompts, *args: asked.extend(prompts) or [[5]] * len(prompts),
    )
    eval_script.main([*flags, "--split", "train"])
    tokenizer = load_tokenizer(folder, "")
    assert asked[:24] == [tokenizer.encode(prompt) for prompt in trained[:24]]
    assert all(p.startswith("<s>[ city ] Q: Imagine that") for p in trained)
    assert all(ids.count(1) == 1 for ids in asked)
    assert all(p.endswith("A: [ country ]") for p in trained)
    line = json.loads((run / "predictions-train.jsonl").open().readline())
    assert line["prompt"].startswith("Q: Imagine") and "country" not in line["tuned"]["prediction"]
    # given answers stand behind the template too
    monkeypatch.setattr(
        "lofit.evaluation.score_answers",
        lambda model, tokenizer, questions, *args: (
            given.extend(questions) or [[0.0] * len(answers) for _, answers, _ in questions]
        ),
    )
    given, base = [], ["--task", "truthfulqa-0", "--base-only", "--run", str(tmp_path / "base")]
    eval_script.main([*flags, *base])
    assert len(given) == 8
    for question, answers, _ in given:
        assert question.startswith("<s>[ city ] Interpret each")
        assert question.endswith("A: [ country ]")
        assert all(answer.startswith(" ") for answer in answers)
