"""What a command imports before all else: Ctrl-C and SIGTERM while the other imports run (seconds,
for torch) end it by one line. From `errors.run` on they are told to the command instead."""

import os
import signal
import sys
from pathlib import Path

COMMANDS = ("select_heads.py", "train.py", "eval.py")


def of_a_command() -> bool:
    """Whether this process is one of the scripts beside the package, or `python -m lofit...`; to
    whoever imports lofit as a library, signals are his own."""
    words, main = sys.orig_argv, getattr(sys.modules["__main__"], "__file__", None)
    if any(
        a == "-m" and b.split(".")[0] == "lofit" for a, b in zip(words, words[1:], strict=False)
    ):
        return True
    root = Path(__file__).resolve().parent.parent
    return main is not None and Path(main).resolve() in [root / name for name in COMMANDS]


def _leave(number: int, _) -> None:
    os.write(2, b"\ninterrupted: nothing had begun\n")
    os._exit(128 + number)


if of_a_command():
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
