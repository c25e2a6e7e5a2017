"""Renders a chat template, which may come from anywhere, in a process of its own with bounds on
time and memory: jinja's sandbox bounds what a template reaches, not how long it loops or how much
it builds. Run by chat.py, with the folders of jinja2 as arguments; reads lines of JSON, the
template first, and answers each by one. Windows has no such bounds.
"""

import json
import signal
import sys
from datetime import datetime

try:
    import resource
except ImportError:  # Windows
    resource = None

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]  # started with -I, Python finds none of the user's packages
import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 2, 256 * 2**20  # of processor time for one text; beyond what the process has


class Generation(Extension):
    """{% generation %}: marks what the model wrote, and changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub expect to find, as in transformers."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = tojson
    found.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return found


def limit_memory() -> None:
    """From here on the process gets no more than BYTES beyond what it has."""
    with open("/proc/self/statm") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + BYTES, present + BYTES))


def answer(line: str, state: dict) -> str:
    """The rendered text; for the first line, which holds template and tokens, an empty one."""
    asked = json.loads(line)
    if "source" in asked:
        state |= {"template": environment().from_string(asked["source"]), "tokens": asked["tokens"]}
        return ""
    return state["template"].render(tools=None, documents=None, **asked, **state["tokens"])


def main() -> None:
    if sys.platform == "linux":
        limit_memory()
    timed = hasattr(signal, "setitimer")
    state: dict = {}
    for line in sys.stdin:
        # nobody handles the signal, so it ends the process, inside a library too
        if timed:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reply = {"text": answer(line, state)}
        except jinja2.TemplateSyntaxError as error:
            reply = {"error": f"is malformed ({error})"}
        except jinja2.TemplateError as error:
            reply = {"error": f"fails ({str(error)[:300]})"}
        except Exception as error:
            reply = {"error": f"fails ({type(error).__name__}: {str(error)[:300]})"}
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
