"""docs/results/audit.py recomputes the pages' numbers from the records, and finds altered ones."""

import re
import subprocess
import sys

import pytest
from conftest import REPO

RESULTS, TABLES = "docs/results.md", "docs/tables.md"
ALTERED = [  # page, where a number stands in it
    (TABLES, r"^\| \S+ \| mquake .*?% \(\+(\d+\.\d) \["),  # points above the base
    (TABLES, r"^\| \S+ \| clutrr .* \[[+-]\d+\.\d, [+-](\d+\.\d)\] \|$"),  # the end of an interval
    (TABLES, r"^\| .* \| \d+ to \d+ \| 0\.\d\d \| (0\.\d\d) \|$"),  # a rank correlation
    (RESULTS, r"^\| 1\. .*?\[[+−](\d+\.\d)"),  # an interval of the verdicts
    (TABLES, r"^\| 2 \| .* 7 or more .* \[-(\d\.\d)"),  # pooled
    (TABLES, r"^\| 5 \| .* red --lr 5e-3 \| 3, 3 \| 45.* (0\.\d{3}) \|$"),  # a p after Holm
    (TABLES, r"^\| 6 \| .* \| 3, (3) \| 29\.7 and 39\.5"),  # how many runs
    ("README.md", r"^\| SmolLM2.*?\(\+(\d+\.\d)"),
]


def audit(root) -> tuple[int, list[str]]:
    command = [sys.executable, REPO / "docs" / "results" / "audit.py", root]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_the_pages_say_what_the_records_say():
    code, lines = audit(REPO)
    assert code == 0, lines
    assert int(lines[-1].split()[0]) > 1000


@pytest.mark.slow
def test_altered_numbers_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results").symlink_to(REPO / "docs" / "results")
    pages = {page: (REPO / page).read_text() for page, _ in ALTERED}
    wrong = []
    for page, pattern in ALTERED:
        match = re.search(pattern, pages[page], re.M)
        last = match.end(1) - 1
        digit = str((int(pages[page][last]) + 5) % 10)
        pages[page] = pages[page][:last] + digit + pages[page][last + 1 :]
        line = pages[page][:last].count("\n") + 1
        wrong.append((f"{page}:{line}: printed ", match[1][:-1] + digit))
    for page, text in pages.items():
        (tmp_path / page).write_text(text)
    code, (*lines, _) = audit(tmp_path)
    assert code == 1 and len(lines) == len(ALTERED)
    for where, number in wrong:
        (line,) = [line for line in lines if line.startswith(where)]
        assert number in line.partition(", recomputed ")[0]
