"""What a reader of the method reads stays short: code without docstrings and comments."""

import ast
import io
import tokenize

from conftest import REPO

METHOD = [f"lofit/{name}.py" for name in ("heads", "losses", "objectives", "training")]
SCRIPTS = ["select_heads.py", "train.py", "eval.py"]
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def lines_of_code(source: str) -> int:
    """Lines with code on them; docstrings, comments and empty lines are none."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_lines_of_code():
    assert lines_of_code('"""Doc."""\n\nx = 1  # one\n# no\ny = (\n    2\n)\n') == 4


def test_the_method_and_the_scripts_are_short():
    found = {name: lines_of_code((REPO / name).read_text()) for name in METHOD + SCRIPTS}
    print(found, sum(found.values()))
    assert sum(found.values()) <= 600, found
