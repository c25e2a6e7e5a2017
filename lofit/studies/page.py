"""Write the tables of a page: under each command of a study stands what it prints.

    python -m lofit.studies.page docs/results.md

A table is everything between <details> and </details> after the command's block. It is made from
the recorded runs; nothing is run.
"""

import argparse
import re
import shlex
from pathlib import Path

from lofit import errors
from lofit.files import read_text, write
from lofit.studies.__main__ import parse_args, printed

PLACE = re.compile(
    r"(```\npython -m lofit\.studies (.*)\n```\n\n<details><summary>.*</summary>\n)"
    r"(?s:.*?)</details>\n"
)


def filled(text: str) -> str:
    """The page with the tables that its commands print."""

    def table(found: re.Match) -> str:
        return f"{found[1]}\n{printed(parse_args(shlex.split(found[2])))}\n\n</details>\n"

    return PLACE.sub(table, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", nargs="+", type=Path, help="like docs/results.md")
    for page in parser.parse_args(argv).page:
        write(page, filled(read_text(page)))


if __name__ == "__main__":
    errors.run(main)
