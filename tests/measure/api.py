"""docs/api.md from the docstrings of what `import lofit` exports.

python tests/measure/api.py
"""

import argparse
import ast
import inspect
from pathlib import Path

import lofit

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
START = """# What `import lofit` exports

Made from the docstrings by `python tests/measure/api.py`. Shapes are in square brackets.
"""


def page() -> str:
    parts = [START]
    for name in sorted(lofit.__all__):
        thing = getattr(lofit, name)
        source = inspect.getsource(inspect.unwrap(thing))
        node = ast.parse(source).body[0]
        signature = f"{name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        file = thing.__module__.replace(".", "/") + ".py"
        text = inspect.getdoc(thing)
        parts.append(f"## {name}\n\n```\n{signature}\n```\n\n[{file}](../{file})\n\n{text}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
