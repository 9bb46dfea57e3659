"""Shared by the scripts that write tables between two marks of a page, or check them."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import births

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
CLASSES = ("amx", "avx512_bf16", "avx512", "avx2", "scalar", "neon_bf16", "neon")  # of CPUs, as the tables order them
RESIDENCY = {"8B": "residency", "70B": "residency_70b"}  # the shape of Llama 3 -> the name of its results

Result = dict[str, Any]


def results_of(name: str, folder: Path = RESULTS) -> dict[str, Result]:
    """CPU class -> the results of that bench: ``train-avx2.json`` is "train" for "avx2"."""
    files = {cpu: folder / f"{name}-{cpu}.json" for cpu in CLASSES}
    return {cpu: json.loads(file.read_text(encoding="utf-8")) for cpu, file in files.items() if file.exists()}


def source(results: Any) -> dict[str, str | None]:
    """Metadata of a picture: SHA-256 of the results it was drawn from, so that a test sees when it is out of date."""
    return {"Source": hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest(), "Software": None}


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def side_by_side(head: Sequence[str], bodies: Mapping[str, Sequence[Sequence[str]]], keys: int = 1) -> list[str]:
    """One table of the rows of all CPU classes, which a column names.

    Rows with equal first ``keys`` cells are adjacent.
    """
    rows = [(tuple(row[:keys]), cpu, row[keys:]) for cpu, body in bodies.items() for row in body]
    order = list(dict.fromkeys(key for key, _, _ in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    return table([*head[:keys], "CPU", *head[keys:]], ([*key, cpu, *rest] for key, cpu, rest in rows))


def between(text: str, begin: str, end: str, lines: Iterable[str]) -> str:
    """``text`` with those lines between its two marks."""
    before, _, rest = text.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"the page has no {begin} ... {end}")
    return before + "\n".join([begin, "", *lines, end]) + after


def rewritten(script: str, blocks: Mapping[str, Callable[[], Iterable[str]]], text: str) -> str:
    """``text``, a page in which each block of the script is between marks of its own, with them made anew."""
    for name, lines in blocks.items():
        begin, end = (f"<!-- bench/{script} {name} {word} -->" for word in ("begins", "ends"))
        text = between(text, begin, end, lines())
    return text


def write_or_check(about: str | None, page: Path, make: Callable[[str], str], source: str) -> None:
    """The command line: ``--write``, or ``--check``, which ends the script, with exit status 1 if the page is stale.

    Marks of old figures do not count (births.py).

    Args:
        about: the script's docstring. make: new text from old text. source: where the figures come from.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = page.read_text(encoding="utf-8")
    wanted = make(text)
    if arguments.check:
        same = births.without_marks(wanted) == births.without_marks(text)
        sys.exit(0 if same else f"{page.name} differs from {source}: run the script with --write")
    page.write_text(wanted, encoding="utf-8")
