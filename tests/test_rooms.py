"""The rooms of the house, read off the imports: what a part of the package may know of."""

import ast
import subprocess
import sys

import pytest
from conftest import REPO

METHOD = ["heads", "losses", "objectives", "training", "recipes"]
SCRIPTS = {"select_heads", "train", "eval"}
EXTRAS = [f"lofit.{room}" for room in ("compare", "inspect", "export", "studies")]
LAZY = [
    "lofit.fast",
    "lofit.distributed",
    "lofit.compare",
]  # where a flag or torchrun asks for them


def imported(path, at_load: bool = False) -> set[str]:
    """Every module that a file names in an import, and each name it takes from one; at_load: only
    those outside of functions."""
    found, tree = set(), ast.parse(path.read_text())
    nodes = tree.body if at_load else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*rooms: str) -> list:
    found = [path for room in rooms for path in sorted(REPO.glob(room))]
    assert found
    return found


def within(names: set[str], *rooms: str) -> set[str]:
    return {n for n in names for room in rooms if n == room or n.startswith(f"{room}.")}


def of_the_package(path, at_load: bool = False) -> set[str]:
    return within(imported(path, at_load), "lofit") - {"lofit"}


@pytest.mark.parametrize("path", files("lofit/llm/*.py"), ids=lambda path: path.stem)
def test_the_language_model_imports_nothing_of_the_package_but_errors(path):
    names = of_the_package(path)
    assert names == within(names, "lofit.llm", "lofit.errors")


@pytest.mark.parametrize("name", METHOD)
def test_the_method_imports_the_language_model_alone(name):
    names = of_the_package(REPO / "lofit" / f"{name}.py", at_load=True)
    allowed = ["lofit.llm", "lofit.errors", *(f"lofit.{other}" for other in METHOD)]
    assert names == within(names, *allowed)


def test_tasks_import_no_model():
    for path in files("lofit/tasks/*.py"):
        names = imported(path)
        assert not within(names, "torch", "lofit.llm", "lofit.run", *[f"lofit.{m}" for m in METHOD])


def test_a_run_knows_nothing_of_what_is_made_of_it():
    for path in files("lofit/run/*.py", *SCRIPTS_FILES):
        assert not within(imported(path, at_load=True), *EXTRAS, *LAZY), path


SCRIPTS_FILES = [f"{name}.py" for name in sorted(SCRIPTS)]


def test_nobody_imports_a_script():
    for path in files("lofit/**/*.py", "data/*.py", "weights/*.py", "*.py"):
        assert not within(imported(path), *SCRIPTS), path


def test_what_is_loaded_with_the_language_model_and_with_training():
    """The model alone knows no method; training loads nothing that its flags do not ask for."""
    show = "print(*[m for m in sys.modules if m.startswith('lofit')])"
    code = f"import sys, lofit.llm.model; {show}; import train; {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    model, training = (set(line.split()) for line in done.stdout.splitlines())
    assert "lofit.llm.model" in model and "lofit.training" in training
    assert not within(model, *(f"lofit.{m}" for m in METHOD), "lofit.tasks", "lofit.run")
    assert not within(training, *EXTRAS, *LAZY)
    assert len(training) <= 34
