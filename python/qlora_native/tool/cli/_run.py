"""What the commands share: missing packages, terminal output, sizes, existing outputs and working time."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora_native._io import is_terminal
from qlora_native.errors import UserError

# Where the import name is not the name that pip knows.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Control characters, those that change the direction of text or end a line, and halves of a character.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def missing_modules(names: Sequence[str]) -> list[str]:
    """Those of the import names that are not installed, found without importing them."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def missing_packages(names: Sequence[str]) -> list[str]:
    """The packages, as pip knows them, of those of the modules that are not installed."""
    return [DISTRIBUTIONS.get(name, name) for name in missing_modules(names)]


def require(what: str, *names: str) -> None:
    """Raise UserError if ``what``, a command or option, needs modules that are not installed."""
    if packages := missing_packages(names):
        is_not = "which are not" if len(packages) > 1 else "which is not"
        raise UserError(f"{what} needs {' and '.join(packages)}, {is_not} installed: pip install {' '.join(packages)}")


def refuse_existing(out: Path, option: str) -> None:
    """Raise UserError if the output is there already: nothing is written over."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another {option} or remove it")


def parse_size(text: str, base: int) -> int | None:
    """Bytes of a size such as 500MB or 24G; None if it is not one.

    ``base`` of the units is 1000 for files and 1024 for memory; KiB, MiB, GiB and TiB are always of 1024.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        return None
    return int(float(match[1]) * (1024 if match[3] else base) ** (1 + "KMGT".index(match[2].upper())))


def stopwatch() -> Callable[[], float]:
    """A function that returns the seconds since this call, to a hundredth."""
    began = time.monotonic()
    return lambda: round(time.monotonic() - began, 2)


def print_result(args: argparse.Namespace, result: Any, lines: Iterable[str], indent: int | None = None) -> None:
    """Print the result as one JSON object with --json, and the lines without."""
    for line in [json.dumps(result, indent=indent)] if args.json else lines:
        print(line, flush=True)


def has_rich_terminal() -> bool:
    """Whether the output is a terminal and rich is installed: elsewhere plain lines are printed."""
    return is_terminal(sys.stdout) and not missing_modules(("rich",))


def printable(text: str, most: int | None = None) -> str:
    """The text with each character that would command the terminal as an escape; lines and tabs stay. Of more than
    ``most`` characters those in the middle are left out."""
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)
