"""The one exception for anything the user can mend, and how a script ends on it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: one line that names the file and key, what was expected, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; InputError and Ctrl-C become one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        sys.exit(_say(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit(_say("\ninterrupted: nothing half-written was left behind"))


def _say(line: str) -> int:
    print(line, file=sys.stderr)
    return 2
