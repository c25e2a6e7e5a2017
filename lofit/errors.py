"""The one exception for anything the user can mend, and how a script ends on it."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 500  # characters of a message: inputs may hold anything
_came: list[int] = []  # signals that `run` was told
_held: list[None] = []  # one for each `held_back` around what is going on


class InputError(ValueError):
    """Bad input: one line that names the file and key, what was expected, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. What the user can mend, a signal and a closed pipe end it by one line
    on stderr: InputError and the pipe with exit code 2, Ctrl-C with 130, SIGTERM with 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        sys.exit(_say(f"error: {one_line(str(error))}", 2))
    except KeyboardInterrupt:
        code = 128 + (_came or [signal.SIGINT])[0]
        sys.exit(_say("\ninterrupted: nothing half-written was left behind", code))
    except BrokenPipeError:
        # what is still to be printed goes nowhere, instead of failing once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_say("error: standard output was closed; send it to a file instead", 2))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the end is near, and Python's own may fail
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, _) -> None:
    _came.append(number)
    if not _held or len(_came) > 1:
        raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes inside interrupts at the end of it, so that what belongs together is done
    together; a second signal does not wait."""
    _held.append(None)
    try:
        yield
    finally:
        _held.pop()
    if _came and not _held:
        raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether a signal came, and waits if it is held back."""
    return bool(_came)


def one_line(text: str) -> str:
    """The text without line breaks, its middle left out where it is long."""
    text = " ".join(text.splitlines())
    half = LONGEST // 2 - 3
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
