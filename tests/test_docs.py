"""README, docs/ and the notebook tell the truth: every path they name exists, every command line
parses."""

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import REPO

NOTEBOOK = REPO / "examples" / "own-model.ipynb"
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), NOTEBOOK]
FOLDERS = ("lofit", "weights", "data", "tests", "docs")
# what commands make, and what is fetched
MADE = ("data/real", "weights/smollm2-135m-instruct", "weights/gemma-3-270m")
PATH = re.compile(
    rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./%-]*\w|(?<![\w./-])[\w-]+\.(?:py|md)\b"
)


def source(page: Path) -> str:
    """A page's text; of a notebook with its cells as fenced blocks, and its names filled in."""
    if page.suffix == ".md":
        return page.read_text()
    parts = []
    for cell in json.loads(page.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```\n{text}\n```")
    names = dict(re.findall(r'^(\w+) = "(.*)"$', "\n".join(parts), re.M))
    return re.sub(r"\{(\w+)\}", lambda m: names[m[1]], "\n".join(parts)).replace("\n!", "\n")


def blocks(page: Path) -> list[str]:
    """The lines of fenced blocks, those of commands with a backslash joined."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", source(page), re.M | re.S)
    found = [block.replace("\\\n", " ") for kind, block in fenced if kind in ("", "bash", "sh")]
    return [line for block in found for line in block.splitlines()]


def commands(page: Path) -> list[str]:
    inline = re.findall(r"`(python [^`]+)`", source(page))
    found = [part.strip() for line in blocks(page) for part in line.split("#")[0].split("&&")]
    return [part for part in dict.fromkeys(found + inline) if part.startswith("python ")]


def exists(name: str, page: Path) -> bool:
    return any((folder / name).exists() for folder in (REPO, page.parent)) or any(
        path.name == name for path in REPO.rglob(name) if ".git" not in path.parts
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page):
    """In folders of this repository, and files named alone."""
    text = re.sub(r"```python.*?```", "", source(page), flags=re.S)
    for name in {match.rstrip(".") for match in PATH.findall(text)}:
        if not name.startswith(MADE):
            assert exists(name, page), f"{page.name}: {name}"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


class Parsed(Exception):
    """The command line was taken; what it asks for is not done."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page, monkeypatch, capsys):
    """Each is started as its line says, up to where its flags are known."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(parser, args=None, namespace=None, parse=parse):
            parse(parser, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)
    monkeypatch.chdir(REPO)
    for command in commands(page):
        words = [word for word in shlex.split(command)[1:] if word != "..."]
        module = words[0] == "-m"
        run, name = (runpy.run_module, words[1]) if module else (runpy.run_path, words[0])
        monkeypatch.setattr(sys, "argv", [name, *words[1 + module :]])
        monkeypatch.syspath_prepend(str(REPO / ("tests" if name.startswith("tests/") else "")))
        try:
            with pytest.raises(Parsed):
                run(name, run_name="__main__")
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")


def test_there_is_something_to_check():
    assert sum(len(commands(page)) for page in PAGES) > 15
    assert len(commands(NOTEBOOK)) == 9


def test_the_page_of_exported_names_is_made_from_their_docstrings():
    import api

    assert api.PAGE.read_text() == api.page(), "run python tests/measure/api.py"
