"""docs/lesson.md and docs/dpo.md: every block runs, in order, and prints what the page shows under
it. Pictures and notebooks are made of the pages."""

import ast
import contextlib
import io
import json
import re
import xml.etree.ElementTree as ET

import lesson
import pytest
import torch
from conftest import REPO

from lofit.heads import attach_offsets, attach_scales, head_scores, random_init
from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer
from lofit.objectives import CrossEntropy
from lofit.training import Schedule, draw_epochs, make_optimizer, train_step

NUMBER = re.compile(r"-?\d+(?:\.\d+)?%?")
SLOT = REPO / "docs" / "slot.svg"
MADE_BY = "python tests/measure/lesson.py --notebook"
PICTURES = [path for page in lesson.PAGES.values() for path in lesson.pictures(page)]
BLOCKS = {"lesson": 22, "dpo": 4}  # of code, in each page
every_page = pytest.mark.parametrize("page", lesson.PAGES.values(), ids=lesson.PAGES)


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
    return [match["printed"] or "" for match in lesson.BLOCK.finditer(page)]


def texts(picture: str) -> list[str]:
    """The words and numbers in a picture."""
    found = (element for element in ET.fromstring(picture).iter() if element.tag.endswith("}text"))
    return ["".join(element.itertext()) for element in found]


@pytest.mark.slow
@every_page
def test_page_and_picture_show_what_a_run_gives(page, monkeypatch):
    """Started where Jupyter starts: in the folder of the notebook."""
    monkeypatch.chdir(page.parent)
    text = page.read_text()
    printed, drawn = lesson.run_page(text, {})
    assert len(printed) == BLOCKS[page.stem]
    for shown, out in zip(shown_outputs(text), printed, strict=True):
        assert agree(shown, out), f"{shown}\n--- printed:\n{out}"
    for path, picture in zip(lesson.pictures(page), drawn, strict=True):
        assert agree("\n".join(texts(path.read_text())), "\n".join(texts(picture)))


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


@pytest.fixture(scope="module")
def taught() -> dict:
    """HeadOffset, HeadScale and fit as the lesson writes them."""
    names: dict = {"draw_epochs": draw_epochs, "Schedule": Schedule, "torch": torch}
    names["nn"] = torch.nn
    for match in lesson.BLOCK.finditer(lesson.PAGES["lesson"].read_text()):
        for node in ast.parse(match["code"]).body:
            if getattr(node, "name", "") in ("HeadOffset", "HeadScale", "fit"):
                exec(ast.unparse(node), names)
    return names


@pytest.fixture
def model():
    return load_model(REPO / "weights" / "mini-llama")


def fit_with_lofit(parameters, objective, schedule) -> float:
    """As select_heads.py and train.py do; returns the mean loss of the last epoch."""
    epochs = draw_epochs(objective.lengths, schedule, seed=42, by_length=True)
    optimizer, total, losses = make_optimizer(parameters, schedule), sum(map(len, epochs)), []
    for step, rows in enumerate(sum(epochs, [])):
        loss = objective.loss(objective.batch(rows))
        losses.append(train_step(optimizer, loss, schedule, step, total)["task_loss"])
    last = losses[-len(epochs[-1]) :]
    return sum(last) / len(last)


def test_the_lesson_trains_as_lofit_does(taught, model):
    """Its modules and its loop, with and without penalty, give the same numbers to the last bit."""
    tokenizer = load_tokenizer(REPO / "weights" / "mini-llama")
    texts = [(f"Q: Who is {name}? A:", "Simon") for name in ("Braviland", "Vuzaport", "Tadatec")]
    objective, layers = (
        CrossEntropy(model, tokenizer, texts * 4),
        [block.self_attn for block in model.model.layers],
    )

    start = random_init(model, 128, seed=42).view(8, 16, 16)
    parameters = attach_scales(model, start)
    loss = fit_with_lofit(parameters, objective, Schedule(5e-2, 2, l1=1e-3))
    scores = head_scores(model)
    for layer, A in zip(layers, start, strict=True):
        layer.head_out = taught["HeadScale"](A.clone())
    own = [layer.head_out.A for layer in layers]
    assert taught["fit"](own, objective, lr=5e-2, epochs=2, l1=1e-3) == loss
    assert torch.equal(torch.stack([A.norm(dim=-1) for A in own]), scores)

    v = random_init(model, 2, seed=42)
    parameters = attach_offsets(model, [(5, 3), (5, 12)], v)
    loss = fit_with_lofit(parameters, objective, Schedule(1.0, 2))
    layers[5].head_out = taught["HeadOffset"]([3, 12], v.clone())
    own = [layers[5].head_out.v]
    assert taught["fit"](own, objective, lr=1.0, epochs=2) == loss
    assert torch.equal(own[0], parameters[0])


def test_filling_a_page_with_its_own_outputs_changes_nothing():
    for page in lesson.PAGES.values():
        text = page.read_text()
        assert lesson.fill(text, shown_outputs(text)) == text
    assert lesson.fill("```python\nx\n```\n\n```\nold\n```\n", [""]) == "```python\nx\n```\n"
    drawn = "```python\nx\n```\n\n```\nnew\n```\n\n![a](a.svg)\n"
    assert lesson.fill(drawn.replace("new", "old"), ["new\n"]) == drawn


@every_page
def test_every_share_and_decimal_of_the_text_was_printed(page):
    """So that a new run with an old text fails."""
    text = page.read_text()
    known = " ".join(shown_outputs(text))
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"```.*?```", "", text, flags=re.S))
    said = re.findall(r"(\d+)(?: (?:to|and|or) (\d+))?\s%", prose)
    shares = [number for pair in said for number in pair if number]
    assert [n for n in shares if not re.search(rf"\b{n}%", known)] == []
    decimals = re.findall(r"−?\d+\.\d+", prose)
    assert [n for n in decimals if n.replace("−", "-") not in known] == []
    assert "False" not in known  # what the page compares is equal


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_the_picture_shows_the_numbers_of_the_page(path):
    """So that a new page with an old picture fails."""
    page = (path.with_suffix(".md")).read_text()
    shown, outputs = texts(path.read_text()), "".join(shown_outputs(page))
    firsts = re.findall(r"the first (\d+%)", outputs)
    assert [text for text in shown if text.endswith("%")] == firsts and len(firsts) == 4
    assert shown.count("×") == 13


@pytest.mark.parametrize("path", [SLOT, *PICTURES], ids=lambda path: path.name)
def test_pictures_are_small_and_need_nothing_from_elsewhere(path):
    root = ET.fromstring(path.read_text())
    assert 500 <= float(root.get("width").removesuffix("pt")) <= 800
    assert path.stat().st_size < 90_000
    links = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', path.read_text())
    assert all(target.startswith("#") for pair in links for target in pair if target)
    assert "#ffffff" in path.read_text()  # a background: readable on a dark page


@every_page
def test_the_notebook_is_made_of_the_page(page):
    text, path = page.read_text(), page.with_suffix(".ipynb")
    made = path.read_text()
    assert made == lesson.notebook(text, page.parent), f"run {MADE_BY}"
    shown = made.count("](data:image/svg+xml;base64,") + made.count('"image/svg+xml": [')
    assert shown == text.count(".svg)")
    nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[test]"')
    nbformat.validate(json.loads(made))
    assert nbformat.writes(nbformat.read(path, 4)) == made.strip()


def test_a_notebook_of_a_small_page(tmp_path):
    """A plain fence after text is text; a block may print nothing; answers stay folded."""
    (tmp_path / "a.svg").write_text("<svg/>")
    page = "# T\n\n![a](a.svg)\n\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n"
    page += "```\n1\n```\n\n![b](a.svg)\n\nText:\n\n```\nno output\n```\n\n"
    folded = "<details><summary>Answer</summary>\n\n```python\nx\n```\n\n</details>"
    cells = json.loads(lesson.notebook(page + folded, tmp_path))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code", "markdown"]
    assert "".join(cells[0]["source"]).endswith("![a](data:image/svg+xml;base64,PHN2Zy8+)")
    assert cells[1]["outputs"] == []
    stream = {"name": "stdout", "output_type": "stream", "text": ["1\n"]}
    data = {"image/svg+xml": ["<svg/>"], "text/plain": ["b"]}
    drawn = {"data": data, "metadata": {}, "output_type": "display_data"}
    assert cells[2]["outputs"] == [stream, drawn] and cells[2]["execution_count"] == 2
    assert "".join(cells[3]["source"]) == "Text:\n\n```\nno output\n```\n\n" + folded


@every_page
def test_every_exercise_has_an_answer_that_runs(page):
    text = page.read_text()
    exercises = re.split(r"^\*\*\d+\.\*\* ", text.partition("## Exercises")[2], flags=re.M)[1:]
    assert exercises
    for exercise in exercises:
        (answer,) = lesson.FOLDED.findall(exercise)
        assert lesson.BLOCK.search(answer)["printed"]


@every_page
def test_a_cell_shows_nothing_but_what_it_prints(page):
    """Jupyter also shows the value of an expression that ends a cell."""
    for match in lesson.BLOCK.finditer(page.read_text()):
        last = ast.parse(match["code"]).body[-1]
        silent = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Constant)
        called = ast.unparse(last.value.func) if silent else "print"
        assert called in ("print", "show", "remove_edits", "plt.show"), match["code"]  # give None


def test_a_page_is_run_as_a_notebook_is():
    """Blocks share names; what is printed and drawn is kept."""
    page = "```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```python\n"
    page += "import matplotlib.pyplot as plt\nplt.figure()\nplt.title('T')\nplt.show()\n```\n"
    with contextlib.redirect_stdout(io.StringIO()) as outside:
        printed, (picture,) = lesson.run_page(page, {})
    assert printed == ["", "1\n", ""] and not outside.getvalue()
    assert "T" in texts(picture)
