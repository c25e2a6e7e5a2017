"""A checkpoint's own chat template: how a chat model wants to be asked."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lofit.errors import InputError
from lofit.files import read_json, read_text
from lofit.llm.checkpoint import find_folder

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_chat_template(name: str | Path, revision: str | None = None) -> Callable[[str], str]:
    """The template of a model folder or hub id, as a function: what the user says -> the text up to
    where the model answers, with all the special tokens there are to be: `load_tokenizer` with
    add_special_tokens=False then adds none.

    Read from chat_template.jinja, or else from tokenizer_config.json. The template runs in a
    sandbox: it may come from anywhere. Raises InputError if there is none or it fails.
    """
    folder = find_folder(name, revision)
    path, settings_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    source = read_text(path) if path.exists() else _named_default(settings.get("chat_template"))
    if not isinstance(source, str):
        raise InputError(
            f"{folder}: no chat template (chat_template.jinja, or in tokenizer_config.json);"
            " is it a chat model? If not, leave --chat out"
        )
    tokens = {key: _content(settings[key]) for key in SPECIAL if settings.get(key)}
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"{folder}: the chat template is malformed ({error})") from None

    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        try:
            return template.render(messages=messages, add_generation_prompt=True, **tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: the chat template fails ({error})") from None

    return render


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub expect to find, as in transformers."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent
    )
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _named_default(template: object) -> object:
    """Some files hold several templates by name."""
    if isinstance(template, list):
        return {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template


def _content(token: object) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
