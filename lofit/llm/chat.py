"""A checkpoint's own chat template: how a chat model wants to be asked. Loaded for --chat alone.

It runs in jinja's sandbox, as in transformers: it reaches nothing, but it may take as long as it
likes (docs/security.md).
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lofit.errors import InputError
from lofit.files import read_text, reading
from lofit.llm.config import ModelConfig
from lofit.llm.hub import find_folder
from lofit.llm.tokenizer import NAMES, load_tokenizer, read_settings

ANSWER = "This is the answer."


def load_chat_template(name: str | Path) -> tuple[Callable[[str], str], str]:
    """(what the user says -> the text up to where the model answers, special tokens included; what
    the template writes after an assistant's answer, "" if it renders no such turn)."""
    render = _template(find_folder(name))
    asked = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, found, end = render(asked).rpartition(ANSWER)
    except InputError:  # a template that renders no answer may still ask; one that cannot says so
        found = end = ""
    return (
        lambda text: render([{"role": "user", "content": text}], add_generation_prompt=True),
        end if found else "",
    )


def _template(folder: Path) -> Callable[..., str]:
    settings, path = read_settings(folder), folder / "chat_template.jinja"
    with reading(folder / "tokenizer_config.json"):
        source = read_text(path) if path.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several templates by name
            source = {each["name"]: each["template"] for each in source}.get("default")
        if source is not None and not isinstance(source, str):
            raise ValueError(f"chat_template is {str(source)[:60]!r}")
    if source is None:
        raise InputError(
            f"{folder}: no chat template (chat_template.jinja, or in tokenizer_config.json); is it"
            " a chat model? If not, leave --chat out"
        )
    tokens = _special_tokens(folder, settings)

    def failed(error: Exception) -> InputError:
        return InputError(f"{folder}: the chat template fails ({type(error).__name__}: {error})")

    try:
        template = _environment().from_string(source)
    except Exception as error:
        raise failed(error) from None

    def render(messages: list[dict], add_generation_prompt: bool = False) -> str:
        asked = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(tools=None, documents=None, **asked, **tokens)
        except Exception as error:  # a template can raise whatever Python can
            raise failed(error) from None

    return render


def _special_tokens(folder: Path, settings: dict) -> dict[str, str]:
    """Those that a template may write. A bos that only config.json names is that token too."""
    found = {key: settings[key] for key in NAMES if settings.get(key) is not None}
    bos = ModelConfig.from_file(folder / "config.json").bos_token_id
    if "bos_token" not in settings and bos is not None:  # null says that there is none
        found["bos_token"] = load_tokenizer(folder).backend.name_of(bos)
    return found


class Generation(Extension):
    """{% generation %}: marks what the model wrote, and changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        next(parser.stream)
        # a scope of its own, as transformers' has: what is set in it ends with it
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), True))


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub expect to find, as in transformers."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(  # jinja2's own escapes HTML
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found
