"""The rooms of the house, read off the imports: what a part of the package may know of."""

import ast
import subprocess
import sys

import pytest
from conftest import REPO

METHOD = [f"lofit.{name}" for name in ("heads", "objectives", "training", "recipes")]
SCRIPTS = ("select_heads", "train", "eval")
# what is imported where a flag or torchrun asks for it, and nowhere at load
LAZY = [
    f"lofit.{room}"
    for room in ("compare", "inspect", "export", "studies", "distributed", "fast")
]  # fmt: skip
ERRORS, LLM = ["lofit.errors"], ["lofit.errors", "lofit.files", "lofit.llm"]
# files -> all of the package that they import at load
MAY_IMPORT = {
    "lofit/errors.py": [],
    "lofit/files.py": ERRORS,
    "lofit/llm/*.py": LLM,
    "lofit/tasks/*.py": [*ERRORS, "lofit.files", "lofit.tasks"],
    "lofit/heads.py": LLM,
    "lofit/objectives.py": [*LLM, *METHOD],
    "lofit/training.py": [*LLM, *METHOD],
    "lofit/recipes.py": [*LLM, *METHOD],
    "lofit/evaluation.py": [*LLM, *METHOD, "lofit.tasks", "lofit.run.setup"],
    "lofit/run/*.py": [*LLM, *METHOD, "lofit.tasks", "lofit.run"],
}


def imported(path, at_load: bool = False) -> set[str]:
    """Every module that a file names in an import, and each name it takes from one; at_load: only
    those outside of functions."""
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], *rooms: str) -> set[str]:
    return {n for n in names for room in rooms if n == room or n.startswith(f"{room}.")}


def files(*patterns: str) -> list:
    found = [path for pattern in patterns for path in sorted(REPO.glob(pattern))]
    assert found
    return found


@pytest.mark.parametrize("pattern", MAY_IMPORT)
def test_a_room_imports_only_what_stands_before_it(pattern):
    for path in files(pattern):
        names = within(imported(path, at_load=True), "lofit") - {"lofit"}
        assert names <= within(names, *MAY_IMPORT[pattern]), path


def test_tasks_know_no_model_and_nobody_imports_a_script():
    for path in files("lofit/tasks/*.py"):
        assert not within(imported(path), "torch", "lofit.llm", "lofit.run", *METHOD), path
    for path in files("lofit/**/*.py", "data/*.py", "weights/*.py", "*.py"):
        assert not within(imported(path), *SCRIPTS), path


def test_processes_meet_in_one_file_and_arguments_stay_at_the_door():
    """torch.distributed is imported in one file; below the scripts nobody is handed a Namespace."""
    package = files("lofit/**/*.py", *(f"{name}.py" for name in SCRIPTS))
    found = [path.stem for path in package if within(imported(path), "torch.distributed")]
    assert found == ["distributed"]
    main_path = files("lofit/*.py", "lofit/llm/*.py", "lofit/tasks/*.py", "lofit/run/*.py",
                      "lofit/fast/*.py", "lofit/compare/*.py")  # fmt: skip
    taken = {str(p.relative_to(REPO / "lofit")) for p in main_path if "Namespace" in p.read_text()}
    assert taken == {"run/arguments.py", "run/setup.py"}


@pytest.mark.slow
def test_what_is_loaded_with_the_language_model_and_with_training():
    """The model alone knows no method; training loads nothing that its flags do not ask for."""
    show = "print(*[m for m in sys.modules if m.startswith('lofit')])"
    code = f"import sys, lofit.llm.model; {show}; import train; {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    model, training = (set(line.split()) for line in done.stdout.splitlines())
    assert "lofit.llm.model" in model and "lofit.training" in training
    assert not within(model, *METHOD, "lofit.tasks", "lofit.run")
    assert not within(training, *LAZY)
    assert len(training) <= 27
