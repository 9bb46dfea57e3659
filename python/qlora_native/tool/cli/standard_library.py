"""Training data from the running Python: predict the first line of a function's docstring.

It is real text without a download, and whole modules are held out: training has seen no function of a held-out file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = "Write the first line of the docstring for this Python function."

# Not code that people wrote to be read: tests, generated tables, vendored packages.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "turtledemo",
    "_vendor",
}
_HELD_OUT_SHARE = 8  # one module in eight
_MIN_SUMMARY, _MAX_SUMMARY = 15, 120  # characters
_MIN_LINES = 3


class Example(NamedTuple):
    """One function without its docstring, and the docstring's first line."""

    module: str
    source: str
    summary: str


def is_held_out(module: str) -> bool:
    """Whether a module belongs to the held-out split: by its name alone, so that it is the same everywhere."""
    return hashlib.sha256(module.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def examples(max_characters: int) -> Iterator[Example]:
    """Every documented function of the standard library whose source has at most ``max_characters``, in a fixed
    order."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in old modules
                tree = ast.parse(text)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        lines = text.splitlines()
        for node in _functions(tree):
            example = _example(".".join(parts), lines, node)
            if example is not None and len(example.source) <= max_characters:
                yield example


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, in the order of ``ast.walk``, which is several times slower because it visits expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, field, ()))


def _example(
    module: str, lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef
) -> Example | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or node.end_lineno is None:
        return None
    summary = docstring.splitlines()[0].strip()
    if not _MIN_SUMMARY <= len(summary) <= _MAX_SUMMARY:
        return None
    documented = node.body[0]
    head = lines[node.lineno - 1 : documented.lineno - 1]
    body = lines[documented.end_lineno : node.end_lineno]
    if len(head) + len(body) < _MIN_LINES:
        return None
    return Example(module, textwrap.dedent("\n".join(head + body)).rstrip(), summary)


def write_split(folder: Path, max_characters: int, held_out_rows: int) -> tuple[Path, Path, int, int]:
    """Write ``train.jsonl`` and ``heldout.jsonl`` (OpenAI messages) into ``folder``.

    Returns the two paths and their numbers of rows. Held-out rows beyond ``held_out_rows`` are thinned out evenly, so
    that every held-out module stays represented.
    """
    first: dict[tuple[str, str], str] = {}  # the module of each distinct row
    for module, source, summary in examples(max_characters):
        first.setdefault((source, summary), module)
    train = [row for row, module in first.items() if not is_held_out(module)]
    held_out = [row for row, module in first.items() if is_held_out(module)]
    if len(held_out) > held_out_rows:
        held_out = [held_out[i * len(held_out) // held_out_rows] for i in range(held_out_rows)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, rows in zip(paths, (train, held_out), strict=True):
        with path.open("w", encoding="utf-8") as file:
            for source, summary in rows:
                question = {"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{source}\n```"}
                chat = [question, {"role": "assistant", "content": summary}]
                file.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")
    return *paths, len(train), len(held_out)
