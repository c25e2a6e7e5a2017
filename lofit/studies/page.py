"""Write the tables of a page: under each command of a study stands what it prints.

    python -m lofit.studies.page docs/tables.md

What a study prints ends with a table. A caption that stands above the last table too is left out.
Under a command of lofit.studies.alone stands all that it prints. Nothing is run: all is made from
the recorded runs.
"""

import argparse
import re
import shlex
from pathlib import Path

from lofit import errors
from lofit.files import read_text, write
from lofit.studies import alone
from lofit.studies.__main__ import caption_and_table, parse_args

# a command's block, a caption, which holds no block and no heading, and a table
PLACE = re.compile(
    r"^(```\npython -m lofit\.studies (.*)\n```\n\n)(?:[^|`#\n].*\n|\n)*(?:\|.*\n)+", re.MULTILINE
)
MAP = re.compile(
    r"^(```\npython -m lofit\.studies\.alone(.*)\n```\n\n)(?:[^`#!\n].*\n|\n)*", re.MULTILINE
)


def filled(text: str) -> str:
    """The page with the tables that its commands print."""
    last = ""

    def table(found: re.Match) -> str:
        nonlocal last
        caption, rows = caption_and_table(parse_args(shlex.split(found[2])))
        above, last = "" if caption == last else f"{caption}\n\n", caption
        return f"{found[1]}{above}{rows}\n"

    def single_heads(found: re.Match) -> str:
        return f"{found[1]}{alone.tables(alone.parse_args(shlex.split(found[2])))[0]}\n\n"

    return MAP.sub(single_heads, PLACE.sub(table, text))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", nargs="+", type=Path, help="like docs/tables.md")
    for page in parser.parse_args(argv).page:
        write(page, filled(read_text(page)))


if __name__ == "__main__":
    errors.run(main)
