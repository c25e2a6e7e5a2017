"""The rooms of the house, read off the imports: what a part of the package may know of."""

import ast
import subprocess
import sys

import pytest
from conftest import REPO

METHOD = [f"lofit.{name}" for name in ("heads", "losses", "objectives", "training")]
SCRIPTS = {"select_heads", "train", "eval"}


def imported(path) -> set[str]:
    """Every module that a file names in an import, and each name it takes from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*rooms: str) -> list:
    return [path for room in rooms for path in sorted(REPO.glob(room))]


def within(names: set[str], *rooms: str) -> set[str]:
    return {n for n in names for room in rooms if n == room or n.startswith(f"{room}.")}


@pytest.mark.parametrize(
    ("room", "must_not_know"),
    [
        ("lofit/llm/*.py", [*METHOD, "lofit.tasks", "lofit.export", "lofit.run.session"]),
        ("lofit/tasks/*.py", ["lofit.llm", "torch", *METHOD]),
        *[(f"{name.replace('.', '/')}.py", ["lofit.tasks", "lofit.export"]) for name in METHOD],
    ],
)
def test_a_room_does_not_know_its_users(room, must_not_know):
    assert files(room)
    for path in files(room):
        assert not within(imported(path), *must_not_know), path


def test_nobody_imports_a_script():
    for path in files("lofit/**/*.py", "data/*.py", "weights/*.py", "*.py"):
        assert not within(imported(path), *SCRIPTS), path


def test_the_language_model_alone_loads_nothing_of_the_method():
    code = "import sys, lofit.llm.model; print(*[m for m in sys.modules if m.startswith('lofit')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    loaded = set(done.stdout.split())
    assert "lofit.llm.model" in loaded
    assert not within(loaded, *METHOD, "lofit.tasks", "lofit.export", "lofit.run.session")
