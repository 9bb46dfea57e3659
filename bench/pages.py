"""What the scripts share that write tables between two marks of a page in docs/, or check those that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def between(text: str, begin: str, end: str, lines: Iterable[str]) -> str:
    """``text`` with those lines between its two marks."""
    before, _, rest = text.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"the page has no {begin} ... {end}")
    return before + "\n".join([begin, "", *lines, end]) + after


def write_or_check(about: str | None, page: Path, make: Callable[[str], str], source: str) -> None:
    """The command line: ``--write``, or ``--check``, which ends the script, with exit status 1 if the page is stale.

    Args:
        about: the script's docstring. make: the new text of the old one. source: what the tables are made from.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = page.read_text(encoding="utf-8")
    wanted = make(text)
    if arguments.check:
        sys.exit(0 if wanted == text else f"docs/{page.name} is not what {source} says: --write it again")
    page.write_text(wanted, encoding="utf-8")
