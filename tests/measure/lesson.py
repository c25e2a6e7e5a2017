"""What is made of docs/lesson.md and docs/dpo.md: the outputs in them, their pictures, notebooks.

python tests/measure/lesson.py               # runs both pages and writes all of it
python tests/measure/lesson.py dpo           # one of them
python tests/measure/lesson.py --notebook    # runs nothing, makes the notebooks of the pages

A block is fenced as python. The plain fence directly after it holds what it prints, the image
directly after that what it draws.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
from pathlib import Path

REPO = Path(__file__).parents[2]
PAGES = {name: REPO / "docs" / f"{name}.md" for name in ("lesson", "dpo")}
BLOCK = re.compile(
    r"```python\n(?P<code>.*?)```\n"
    r"(?:\n```\n(?P<printed>.*?)```\n)?"
    r"(?:\n!\[(?P<alt>[^]]*)\]\((?P<drawn>[\w.-]+\.svg)\)\n)?",
    re.S,
)
FOLDED = re.compile(r"<details>.*?</details>", re.S)
IMAGE = re.compile(r"(!\[[^]]*\]\()([\w.-]+\.svg)\)")


def run_page(text: str, names: dict) -> tuple[list[str], list[str]]:
    """What each block prints, and the pictures as SVG. The blocks share `names`."""
    import matplotlib

    matplotlib.use("svg")
    # text stays text, and the same numbers give the same file
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lofit"}
    from matplotlib import pyplot

    printed, drawn = [], []
    for match in BLOCK.finditer(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(match["code"], "<page>", "exec"), names)
        printed.append(out.getvalue())
        for number in pyplot.get_fignums():
            svg = io.StringIO()
            pyplot.figure(number).savefig(svg, metadata={"Date": None})
            drawn.append(svg.getvalue())
        pyplot.close("all")
    return printed, drawn


def fill(text: str, printed: list[str]) -> str:
    """The page with these outputs."""
    left = iter(printed)

    def filled(match: re.Match) -> str:
        out = next(left)
        image = f"\n![{match['alt']}]({match['drawn']})\n" if match["drawn"] else ""
        return f"```python\n{match['code']}```\n" + (f"\n```\n{out}```\n" if out else "") + image

    return BLOCK.sub(filled, text)


def pictures(page: Path) -> list[Path]:
    """The files of what the page's blocks draw, in their order."""
    found = [match["drawn"] for match in BLOCK.finditer(page.read_text())]
    return [page.with_name(name) for name in found if name]


def notebook(text: str, folder: Path) -> str:
    """The page as a Jupyter notebook, format 4.5. A block is a code cell with its output; what is
    between blocks is a Markdown cell, and so is an answer that is folded away, with its code. The
    SVG files it shows, from `folder`, become part of it: GitHub shows no SVG file in a notebook."""
    cells, end, count = [], 0, 0
    folded = [match.span() for match in FOLDED.finditer(text)]

    def add(kind: str, source: str, **more) -> None:
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}}
        cells.append(cell | more | {"source": source.strip("\n").splitlines(keepends=True)})

    def embedded(match: re.Match) -> str:
        data = base64.b64encode((folder / match[2]).read_bytes()).decode()
        return f"{match[1]}data:image/svg+xml;base64,{data})"

    blocks = BLOCK.finditer(text)
    open_blocks = [m for m in blocks if not any(a < m.start() < b for a, b in folded)]
    for match in [*open_blocks, None]:
        between = text[end : match.start() if match else None]
        if between.strip():
            add("markdown", IMAGE.sub(embedded, between))
        if match:
            end, count = match.end(), count + 1
            outputs = []
            if match["printed"]:
                lines = match["printed"].splitlines(keepends=True)
                outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
            if match["drawn"]:
                svg = (folder / match["drawn"]).read_text().splitlines(keepends=True)
                data = {"image/svg+xml": svg, "text/plain": [match["alt"]]}
                outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
            add("code", match["code"], execution_count=count, outputs=outputs)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}")
    parser.add_argument("--notebook", action="store_true", help="only make the notebooks")
    args = parser.parse_args(argv)
    os.chdir(REPO)
    for page in [PAGES[name] for name in args.pages or PAGES]:
        if not args.notebook:
            text = page.read_text()
            printed, drawn = run_page(text, {})
            page.write_text(fill(text, printed))
            for path, svg in zip(pictures(page), drawn, strict=True):
                path.write_text(svg)
        page.with_suffix(".ipynb").write_text(notebook(page.read_text(), page.parent))


if __name__ == "__main__":
    main()
