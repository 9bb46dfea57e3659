"""How much code the Python package is.

Counted are the tokens of `tokenize`, without comments and docstrings, and the lines that hold them: what a reader has
to parse, however it is wrapped. A string is one token, an f-string too (Python 3.12 made it several).
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
OPENS, CLOSES = (
    {getattr(tokenize, f"{letter}STRING_{end}", None) for letter in "FT"} - {None} for end in ("START", "END")
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def size(text: str) -> tuple[int, int]:
    """Tokens of a file, and lines that hold one."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    count, depth, lines = 0, 0, set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_counted = depth == 0 and token.type not in LAYOUT
        if is_counted and not (token.type == tokenize.STRING and token.start[0] in docstrings):
            count += 1
        if depth or (is_counted and token.start[0] not in docstrings):
            lines |= set(range(token.start[0], token.end[0] + 1))
        depth += (token.type in OPENS) - (token.type in CLOSES)
    return count, len(lines)


def sizes(files: Iterable[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """The same, summed by unit, largest first; ``files``: pairs of a unit and a text."""
    found: dict[str, tuple[int, int]] = {}
    for unit, text in files:
        tokens, lines = size(text)
        before = found.get(unit, (0, 0))
        found[unit] = before[0] + tokens, before[1] + lines
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
