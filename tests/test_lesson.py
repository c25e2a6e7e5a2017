"""docs/lesson.md: every block runs, in order, and prints what stands beneath it.

python tests/test_lesson.py      # writes what the blocks print into the page
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PAGE = REPO / "docs" / "lesson.md"
BLOCK = re.compile(r"```python\n(.*?)```\n\n```\n(.*?)```\n|```python\n(.*?)```\n", re.S)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?%?")


def run_page(text: str) -> list[tuple[str, str]]:
    """(what is shown, what was printed) of each block; blocks share their names."""
    names: dict = {}
    found = []
    for code, shown, silent in BLOCK.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code or silent, str(PAGE), "exec"), names)
        found.append((shown, printed.getvalue()))
    return found


def agree(shown: str, printed: str) -> bool:
    """The same words and whole numbers, heads among them; decimals within a tenth, percentages
    within four points: sums round otherwise on other processors, and training carries it on."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    return all(map(close, NUMBER.findall(shown), NUMBER.findall(printed)))


def close(one: str, other: str) -> bool:
    """Of two numbers as they were printed."""
    a, b = (float(number.rstrip("%")) for number in (one, other))
    if one.endswith("%") and other.endswith("%"):
        return abs(a - b) <= 4
    if "." in one and "." in other:
        return abs(a - b) <= 0.1 * abs(a) + 0.02
    return one == other


@pytest.mark.slow
def test_the_page_shows_what_its_blocks_print(monkeypatch):
    monkeypatch.chdir(REPO)
    found = run_page(PAGE.read_text())
    assert len(found) > 10
    for shown, printed in found:
        assert agree(shown, printed), f"{shown}\n--- printed:\n{printed}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.00\n", "a 1.02\n", True),
        ("a 1.00\n", "a 1.20\n", False),
        ("a 1\n", "b 1\n", False),
        ("a 0.02\n", "a 0.05\n", False),
        ("heads: [(7, 5), (6, 15)]\n", "heads: [(7, 5), (6, 15)]\n", True),
        ("heads: [(7, 5), (6, 15)]\n", "heads: [(7, 5), (6, 14)]\n", False),
        ("layer 6: 9%\n", "layer 7: 9%\n", False),
        ("layer 6: 9%, 0.50\n", "layer 6: 9%, 0.90\n", False),
        ("9%\n", "9\n", False),
        ("9%\n", "12%\n", True),
        ("9%\n", "20%\n", False),
        ("a\n", "a\na\n", False),
    ],
)
def test_what_counts_as_the_same(shown, printed, same):
    assert agree(shown, printed) == same


if __name__ == "__main__":
    page = PAGE.read_text()
    printed = iter([p for _, p in run_page(page)])

    def fill(match: re.Match) -> str:
        code, _, silent = match.groups()
        out = next(printed)
        return f"```python\n{code}```\n\n```\n{out}```\n" if code else f"```python\n{silent}```\n"

    PAGE.write_text(BLOCK.sub(fill, page))
