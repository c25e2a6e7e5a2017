"""The exception for bad input, and how a script ends on it."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

LONGEST = 500  # characters of a message: inputs may hold anything
MEMORY = (
    "the memory is full; take a smaller --batch-size or --dtype bfloat16, or see what the model"
    " needs by python -m lofit.inspect.memory"
)


def speaks() -> bool:
    """Whether this process says why it ends; under torchrun distributed.py has another answer."""
    return True


class InputError(ValueError):
    """Bad input: one line that names the file and key, what was expected, and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text without line breaks, control characters and, where it is long, its middle."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))
    half = LONGEST // 2 - 3
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def warn(message: str, places: Sequence[str] = ()) -> None:
    """One line on stderr. places: where it is so; the first is named, the others are counted."""
    first, *others = places or [""]
    more = f" and {len(others)} more" if others else ""
    print(one_line(f"warning: {first}{more}{': ' if first else ''}{message}"), file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. What its user can mend ends it with one line on stderr, not with a
    traceback: exit code 2, or 130 for Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # a terminal may know fewer characters than a text: after an hour's run, show a "?" instead
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _end(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _end(f"error: {MEMORY}", 2)
    except KeyboardInterrupt:
        _end("\ninterrupted; the same command continues after the last whole epoch", 130)
    except BrokenPipeError:  # `python eval.py | head`: what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end("error: standard output was closed; send it to a file instead", 2)


def _is_out_of_memory(error: Exception) -> bool:
    """torch's error on a GPU is named here by its name, for importing torch takes a second."""
    of_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or of_gpu or "can't allocate memory" in str(error)


def _end(line: str, code: int) -> None:
    if speaks():
        print(line, file=sys.stderr)
    sys.exit(code)
