"""What is made of docs/lesson.md: the outputs in the page, docs/lesson.svg, docs/lesson.ipynb.

python tests/measure/lesson.py               # runs the page and writes all three
python tests/measure/lesson.py --notebook    # runs nothing, makes the notebook of the page

A block is fenced as python. The plain fence directly after it holds what it prints.
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
PAGE = REPO / "docs" / "lesson.md"
PICTURE, NOTEBOOK = PAGE.with_suffix(".svg"), PAGE.with_suffix(".ipynb")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```\n(.*?)```\n)?", re.S)
IMAGE = re.compile(r"(!\[[^]]*\]\()([\w.-]+\.svg)\)")
SHOWN = ("base", "13 random heads", "the first 13")  # of section 7's table
CELL, BAR = 20, 28  # pixels: a head of the map, and from one bar to the next


def run_page(text: str, names: dict) -> list[str]:
    """What each block prints. The blocks share `names`."""
    printed = []
    for code, _ in BLOCK.findall(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(PAGE), "exec"), names)
        printed.append(out.getvalue())
    return printed


def fill(text: str, printed: list[str]) -> str:
    """The page with these outputs."""
    left = iter(printed)

    def filled(match: re.Match) -> str:
        out = next(left)
        return f"```python\n{match[1]}```\n" + (f"\n```\n{out}```\n" if out else "")

    return BLOCK.sub(filled, text)


def picture(names: dict) -> str:
    """docs/lesson.svg from the names of a run of the page: the score of every head as a map, and
    right answers and loss before and after."""
    scores, heads = names["scores"], names["heads"]
    results = {name: names["results"][name] for name in SHOWN}
    highest = max(loss for loss, _ in results.values())
    parts = [_head_map(scores / scores.max(), heads)]
    shares = [(name, f"{share:.0%}", share) for name, (_, share) in results.items()]
    losses = [(name, f"{loss:.2f}", loss / highest) for name, (loss, _) in results.items()]
    parts.append(_bars(24, "Right answers to 100 test questions", shares))
    parts.append(_bars(150, "Training loss", losses))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="272" viewBox="0 0 720 272"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#1f2328">\n'
        '<rect x="0.5" y="0.5" width="719" height="271" rx="10" fill="#ffffff" stroke="#d0d7de"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: int, y: int, words: object, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def _head_map(shades, heads: list[tuple[int, int]]) -> str:
    """Layers (rows, the last on top) x heads (columns). shades: [layer, head] in 0..1."""
    n_layers, n_heads = shades.shape
    lines = [_text(0, -14, f"Step 1: score of every head ({len(heads)} are chosen)")]
    for layer in range(n_layers):
        y = CELL * (n_layers - 1 - layer)
        lines.append(_text(-8, y + 14, layer, "end", 11))
        for head in range(n_heads):
            chosen = ' stroke="#bc4c00" stroke-width="3"' if (layer, head) in heads else ""
            lines.append(
                f'<rect x="{CELL * head + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}"'
                f' fill="#0969da" fill-opacity="{shades[layer, head]:.2f}"{chosen}/>'
            )
    bottom, right = CELL * n_layers, CELL * n_heads
    columns = [_text(CELL * h + CELL // 2, bottom + 14, h, "middle", 11) for h in range(n_heads)]
    lines += [*columns, _text(right // 2, bottom + 30, "head", "middle", 11)]
    turned = f'<g transform="translate(-26 {bottom // 2}) rotate(-90)">'
    lines.append(f"{turned}{_text(0, 0, 'layer', 'middle', 11)}</g>")
    return "\n".join(['<g transform="translate(48 48)">', *lines, "</g>"])


def _bars(y: int, title: str, rows: list[tuple[str, str, float]]) -> str:
    """One bar a row. rows: (name, its number as text, share of the full length)."""
    lines = [f'<g transform="translate(410 {y})">', _text(0, 10, title)]
    for i, (name, number, share) in enumerate(rows):
        top, colour = 22 + BAR * i, "#bc4c00" if i else "#8c959f"
        lines += [
            _text(66, top + 14, name, "end"),
            f'<svg x="76" y="{top}" width="150" height="20">'
            '<rect width="100%" height="20" fill="#f6f8fa"/>'
            f'<rect width="{share:.0%}" height="20" fill="{colour}"/></svg>',
            _text(236, top + 14, number),
        ]
    return "\n".join([*lines, "</g>"])


def notebook(text: str, folder: Path) -> str:
    """The page as a Jupyter notebook, format 4.5. A block is a code cell with its output; what is
    between blocks is a Markdown cell. The SVG files it shows, from `folder`, become part of it:
    GitHub shows no SVG file in a notebook."""
    cells, end, count = [], 0, 0

    def add(kind: str, source: str, **more) -> None:
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}}
        cells.append(cell | more | {"source": source.strip("\n").splitlines(keepends=True)})

    def embedded(match: re.Match) -> str:
        data = base64.b64encode((folder / match[2]).read_bytes()).decode()
        return f"{match[1]}data:image/svg+xml;base64,{data})"

    for match in [*BLOCK.finditer(text), None]:
        between = text[end : match.start() if match else None]
        if between.strip():
            add("markdown", IMAGE.sub(embedded, between))
        if match:
            end, count = match.end(), count + 1
            stream = {"name": "stdout", "output_type": "stream"}
            lines = (match[2] or "").splitlines(keepends=True)
            outputs = [stream | {"text": lines}] if lines else []
            add("code", match[1], execution_count=count, outputs=outputs)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notebook", action="store_true", help="only make the notebook")
    args = parser.parse_args(argv)
    if not args.notebook:
        os.chdir(REPO)
        names: dict = {}
        text = PAGE.read_text()
        PAGE.write_text(fill(text, run_page(text, names)))
        PICTURE.write_text(picture(names))
    NOTEBOOK.write_text(notebook(PAGE.read_text(), PAGE.parent))


if __name__ == "__main__":
    main()
