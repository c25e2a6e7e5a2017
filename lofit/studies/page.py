"""Write the tables of a page: under each command of a study stands what it prints.

    python -m lofit.studies.page docs/results.md

A table is everything between <details> and </details> after the command's block. It is made from
the recorded runs; nothing is run.
"""

import re
import shlex
import sys
from pathlib import Path

from lofit import errors
from lofit.errors import InputError
from lofit.files import read_text, write
from lofit.studies.__main__ import parse_args, printed

PLACE = re.compile(
    r"```\npython -m lofit\.studies (?P<flags>[^\n]*)\n```\n\n"
    r"<details><summary>(?P<title>[^\n]*)</summary>\n.*?</details>\n",
    re.S,
)


def filled(text: str) -> str:
    """The page with the tables that its commands print."""

    def one(found: re.Match) -> str:
        args = parse_args(shlex.split(found["flags"]))
        return (
            f"```\npython -m lofit.studies {found['flags']}\n```\n\n"
            f"<details><summary>{found['title']}</summary>\n\n"
            f"{printed(args)}\n\n</details>\n"
        )

    return PLACE.sub(one, text)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise InputError("expected one page, like docs/results.md")
    write(Path(argv[0]), filled(read_text(Path(argv[0]))))


if __name__ == "__main__":
    errors.run(main)
