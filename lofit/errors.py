"""The exception for bad input, and how a script ends on it and on signals."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 500  # characters of a message: inputs may hold anything
MEMORY = (
    "the memory is full; take a smaller --batch-size or --dtype bfloat16, or see what the model"
    " needs by python -m lofit.inspect.memory"
)
_signals: list[int] = []  # that arrived since `run` began
_critical_depth: list[None] = []  # one entry for each `held_back` that is entered


class InputError(ValueError):
    """Bad input: one line that names the file and key, what was expected, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. Bad input, full memory, a closed pipe and a signal end it with one
    line on stderr: signals with exit code 130 (Ctrl-C) and 143 (SIGTERM), the others with 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        sys.exit(_say(f"error: {one_line(str(error))}", 2))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(_say(f"error: {MEMORY}", 2))
    except KeyboardInterrupt:
        code = 128 + (_signals or [signal.SIGINT])[0]
        sys.exit(_say("\ninterrupted: nothing half-written was left behind", code))
    except BrokenPipeError:
        # what is still to be printed goes nowhere, instead of failing once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_say("error: standard output was closed; send it to a file instead", 2))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the end is near, and Python's own may fail
            signal.signal(number, signal.SIG_IGN)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or torch on any device, found no memory."""
    of_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    return isinstance(error, MemoryError) or of_gpu or "can't allocate memory" in str(error)


def _interrupt(number: int, _) -> None:
    _signals.append(number)
    if not _critical_depth or len(_signals) > 1:
        raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """Delay a signal to the end of the block, so that what belongs together is done together; a
    second signal does not wait."""
    _critical_depth.append(None)
    try:
        yield
    finally:
        _critical_depth.pop()
    if _signals and not _critical_depth:
        raise KeyboardInterrupt


def one_line(text: str) -> str:
    """The text without line breaks, control characters and, where it is long, its middle."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.splitlines()))
    half = LONGEST // 2 - 3
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
