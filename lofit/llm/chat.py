"""A checkpoint's own chat template: how a chat model wants to be asked."""

import importlib.util
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

from lofit.errors import InputError, one_line
from lofit.llm.files import read_text
from lofit.llm.folder import find_folder
from lofit.llm.special import SETTINGS, read_settings, template_tokens

RENDER = Path(__file__).with_name("render.py")
ANSWER = "This is the answer."


def load_chat_template(name: str | Path, revision: str | None = None) -> Callable[[str], str]:
    """The template of a model folder or hub id, as a function: what the user says -> the text up to
    where the model answers, with all the special tokens there are to be: `load_tokenizer` with
    add_special_tokens=False then adds none.

    Read from chat_template.jinja, or else from tokenizer_config.json. The template runs in a
    sandbox and in a process with bounds: it may come from anywhere. Raises InputError if there is
    none or it fails.
    """
    folder = find_folder(name, revision)
    found = _open_template(folder)
    if found is None:
        raise InputError(
            f"{folder}: no chat template (chat_template.jinja, or in tokenizer_config.json);"
            " is it a chat model? If not, leave --chat out"
        )
    return found


def end_of_turn(folder: Path) -> str:
    """What a folder's chat template writes after an assistant's answer: "" if there is no template
    or it renders no such turn."""
    try:
        template = _open_template(folder)
        asked = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": ANSWER}
        text = template.render(list(asked), False) if template else ""
    except InputError:  # a template that renders no answer may still ask; one that cannot says so
        return ""
    return text.rpartition(ANSWER)[2] if ANSWER in text else ""


def _open_template(folder: Path) -> "_Renderer | None":
    path, settings = folder / "chat_template.jinja", read_settings(folder)
    template = settings.get("chat_template")
    source = read_text(path) if path.exists() else _named_default(template, folder / SETTINGS)
    if source is None:
        return None
    return _Renderer(folder, source, template_tokens(folder, settings))


class _Renderer:
    """A process that renders (see render.py); called with what the user says. It ends with this
    object."""

    def __init__(self, folder: Path, source: str, tokens: dict[str, str]):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(RENDER), *_folders_of("jinja2", "markupsafe")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )
        weakref.finalize(self, _end, self.process)
        self._ask({"source": source, "tokens": tokens})

    def __call__(self, text: str) -> str:
        return self.render([{"role": "user", "content": text}], True)

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The text of messages; with the generation prompt, up to where the model answers."""
        return self._ask({"messages": messages, "add_generation_prompt": add_generation_prompt})

    def _ask(self, message: dict) -> str:
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            late = self.process.wait() == -getattr(signal, "SIGPROF", 0)
            why = "it takes too long" if late else "its process ended"
            reply = {"error": f"fails ({why})"}
        else:
            reply = json.loads(line)
        if "error" in reply:
            raise InputError(f"{self.folder}: the chat template {one_line(reply['error'])}")
        if not reply["text"].isascii() and any("\ud800" <= c <= "\udfff" for c in reply["text"]):
            raise InputError(
                f"{self.folder}: the text that the chat template makes holds half a character;"
                " correct the template, or the text that it was given"
            )
        return reply["text"]


def _folders_of(*packages: str) -> list[str]:
    """Where this process finds packages: the renderer must not take others."""
    found = [importlib.util.find_spec(package) for package in packages]
    if None in found:
        raise InputError("chat templates need the package jinja2; install it: pip install jinja2")
    return list(dict.fromkeys(str(Path(spec.origin).absolute().parents[1]) for spec in found))


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def _named_default(template: object, path: Path) -> str | None:
    """Some files hold several templates by name; InputError for what is neither that nor one."""
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {str(each.get("name")): each.get("template") for each in template}.get("default")
    if template is None or isinstance(template, str):
        return template
    raise InputError(
        f"{path}: chat_template is {str(template)[:60]!r}; expected a text, or a list of objects"
        " with name and template"
    )
