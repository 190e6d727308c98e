"""Functions with their docstrings, as pairs of an instruction and the code that follows it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

_WISH = range(20, 300)  # characters of the docstring's first paragraph
_CODE = range(20, 900)


def functions(text: str) -> Iterator[tuple[str, str]]:
    """(wish, code) of each documented function of a module: the first paragraph of its docstring, and the function
    without it. A module that does not parse gives none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        wish = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if len(wish) not in _WISH:
            continue
        node.body = node.body[1:]
        code = ast.unparse(node)
        if len(code) in _CODE:
            yield f"{node.name}: {wish}", code
