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
        "lofit.run.session.generate_all",
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
    line = json.loads((tmp_path / "runs" / "predictions.jsonl").open().readline())
    assert line["prompt"].startswith("Q: Imagine") and "country" not in line["tuned"]["prediction"]
    with pytest.raises(
        InputError, match="offsets.safetensors: trained with chat True, asked for chat False"
    ):
        eval_script.main(eval_run)


def test_given_answers_stand_behind_the_template_too(chatty, small_data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lofit.run.session.score_answers",
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
