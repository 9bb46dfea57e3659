"""What the commands share: options, missing packages, terminal output, sizes, existing outputs and working time."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_native._io import as_write_error, is_terminal, user_path
from qlora_native.errors import UserError

# Where the import name is not the name that pip knows.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Control characters, those that change the direction of text or end a line, and halves of a character.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What the value of an option becomes, by the word that stands for it in the help; text of any other word.
_PATHS = ("MODEL", "ADAPTER", "SRC", "DST", "DIR", "FILE", "PATH")
_TYPES: dict[str, Any] = {"N": int, "X": float, **dict.fromkeys(_PATHS, user_path)}


class _AtLeast(argparse.Action):
    """Stores numbers; UserError for one below ``const``."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        for value in values if isinstance(values, list) else [values]:
            if value < self.const:
                raise UserError(
                    f"{parser.prog}: {option_string} is {value}: expected {self.const} or more"
                )
        setattr(namespace, self.dest, values)


def add_to(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """A function that adds an argument, whose ``value`` is the word for it in the help, or the choices; a switch has
    none. ``least`` is that of a number, ``options`` are argparse's."""

    def add(name: str, value: str | Sequence[str] | None, help: str, **options: Any) -> None:
        if value is None:
            options["action"] = "store_true"
        elif isinstance(value, str):
            options = {"metavar": value, "type": _TYPES.get(value), **options}
        else:
            options["choices"] = value
        if "least" in options:
            options |= {"action": _AtLeast, "const": options.pop("least")}
        parser.add_argument(name, help=help, **options)

    return add


def missing_packages(names: Sequence[str]) -> list[str]:
    """The packages, as pip knows them, of those of the modules that are not installed, found without importing them."""
    return [DISTRIBUTIONS.get(name, name) for name in names if importlib.util.find_spec(name) is None]


def require(what: str, *names: str) -> None:
    """Raise UserError if ``what``, a command or option, needs modules that are not installed."""
    if packages := missing_packages(names):
        is_not = "which are not" if len(packages) > 1 else "which is not"
        raise UserError(
            f"{what} needs {' and '.join(packages)}, {is_not} installed: pip install {' '.join(packages)}"
        )


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


def print_result(
    args: argparse.Namespace, result: Any, lines: Iterable[str], indent: int | None = None
) -> None:
    """Print the result as one JSON object with --json, and the lines without."""
    print(*[json.dumps(result, indent=indent)] if args.json else lines, sep="\n", flush=True)


@contextmanager
def picture(option: str, file: Path) -> Iterator[Any]:
    """A figure of matplotlib, written when the block ends to the PNG file that ``option`` names."""
    require(option, "matplotlib")
    from matplotlib.figure import Figure

    if file.suffix != ".png":
        raise UserError(f"{option} is {file}: expected a name that ends in .png")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    yield figure
    with as_write_error(file):
        figure.savefig(file, dpi=120)


def has_rich_terminal() -> bool:
    """Whether the output is a terminal and rich is installed: elsewhere plain lines are printed."""
    return is_terminal(sys.stdout) and not missing_packages(["rich"])


def printable(text: str, most: int | None = None) -> str:
    """The text with each character that would command the terminal as an escape; lines and tabs stay. Of more than
    ``most`` characters those in the middle are left out."""
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)
