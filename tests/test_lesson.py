"""docs/lesson.md: every block runs, in order, and prints what the page shows under it. The picture
and the notebook are made of the page."""

import ast
import json
import re
import xml.etree.ElementTree as ET

import lesson
import pytest

NUMBER = re.compile(r"-?\d+(?:\.\d+)?%?")
SLOT = lesson.PAGE.with_name("slot.svg")
MADE_BY = "python tests/measure/lesson.py --notebook"


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


def shown_outputs(page: str) -> list[str]:
    return [shown for _, shown in lesson.BLOCK.findall(page)]


@pytest.mark.slow
def test_page_and_picture_show_what_a_run_gives(monkeypatch):
    """Started where Jupyter starts: in the folder of the notebook."""
    monkeypatch.chdir(lesson.PAGE.parent)
    page, names = lesson.PAGE.read_text(), {}
    printed = lesson.run_page(page, names)
    assert len(printed) > 10
    for shown, out in zip(shown_outputs(page), printed, strict=True):
        assert agree(shown, out), f"{shown}\n--- printed:\n{out}"
    assert agree(lesson.PICTURE.read_text(), lesson.picture(names))


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.00\n", "a 1.02\n", True), ("a 1.00\n", "a 1.20\n", False), ("a 1\n", "b 1\n", False),
        ("a 0.02\n", "a 0.05\n", False), ("[(7, 5), (6, 15)]\n", "[(7, 5), (6, 15)]\n", True),
        ("[(7, 5), (6, 15)]\n", "[(7, 5), (6, 14)]\n", False), ("9%\n", "9\n", False),
        ("layer 6: 9%\n", "layer 7: 9%\n", False), ("9%, 0.50\n", "9%, 0.90\n", False),
        ("9%\n", "12%\n", True), ("9%\n", "20%\n", False), ("a\n", "a\na\n", False),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(shown, printed, same):
    assert agree(shown, printed) == same


def test_filling_the_page_with_its_own_outputs_changes_nothing():
    page = lesson.PAGE.read_text()
    assert lesson.fill(page, shown_outputs(page)) == page
    assert lesson.fill("```python\nx\n```\n\n```\nold\n```\n", [""]) == "```python\nx\n```\n"


def test_the_picture_shows_the_numbers_of_the_page():
    """Its texts stand in the page too, so that a new page with an old picture fails."""
    outputs, picture = "".join(shown_outputs(lesson.PAGE.read_text())), lesson.PICTURE.read_text()
    rows = re.findall(r"(.+): training loss (.+), right (.+) of 100 test", outputs)
    rows = [row for row in rows if row[0] in lesson.SHOWN]
    assert len(rows) == 3
    texts = [e.text for e in ET.fromstring(picture).iter() if e.tag.endswith("}text")][-14:]
    assert texts[1:7] == [word for name, _, share in rows for word in (name, share)]
    assert texts[8:] == [word for name, loss, _ in rows for word in (name, loss)]
    assert picture.count('stroke-width="3"') == 13 and picture.count("fill-opacity") == 8 * 16


@pytest.mark.parametrize("path", [SLOT, lesson.PICTURE], ids=lambda path: path.name)
def test_pictures_are_small_and_need_nothing_from_elsewhere(path):
    root = ET.fromstring(path.read_text())
    assert 600 <= int(root.get("width")) <= 800 and path.stat().st_size < 60_000
    tags = {element.tag.partition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "defs", "marker", "path", "rect", "circle", "text", "tspan"}
    assert "href" not in path.read_text()
    background = next(e for e in root.iter() if e.tag.endswith("rect"))
    assert background.get("fill") == "#ffffff"  # readable on a dark page


def test_the_notebook_is_made_of_the_page():
    page, made = lesson.PAGE.read_text(), lesson.NOTEBOOK.read_text()
    assert made == lesson.notebook(page, lesson.PAGE.parent), f"run {MADE_BY}"
    assert made.count("](data:image/svg+xml;base64,") == page.count(".svg)") == 2
    nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[test]"')
    nbformat.validate(json.loads(made))
    assert nbformat.writes(nbformat.read(lesson.NOTEBOOK, 4)) == made.strip()


def test_a_notebook_of_a_small_page(tmp_path):
    """A plain fence after text is text; a block may print nothing."""
    (tmp_path / "a.svg").write_text("<svg/>")
    page = "# T\n\n![a](a.svg)\n\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n"
    page += "```\n1\n```\n\nText:\n\n```\nno output\n```\n"
    cells = json.loads(lesson.notebook(page, tmp_path))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code", "markdown"]
    assert "".join(cells[0]["source"]).endswith("![a](data:image/svg+xml;base64,PHN2Zy8+)")
    assert cells[1]["outputs"] == []
    stream = {"name": "stdout", "output_type": "stream", "text": ["1\n"]}
    assert cells[2]["outputs"] == [stream] and cells[2]["execution_count"] == 2
    assert "".join(cells[3]["source"]) == "Text:\n\n```\nno output\n```"


def test_a_cell_shows_nothing_but_what_it_prints():
    """Jupyter also shows the value of an expression that ends a cell."""
    for code, _ in lesson.BLOCK.findall(lesson.PAGE.read_text()):
        last = ast.parse(code).body[-1]
        silent = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Constant)
        called = ast.unparse(last.value.func) if silent else "print"
        assert called in ("print", "set_edits"), code  # both return None
