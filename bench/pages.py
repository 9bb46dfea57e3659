"""What the scripts that write pages share: results, sections of a page, and one command line.

To add a table to docs/performance.md, add to readme.py's SECTIONS, at the name of its results, what is said above it
and its spec, which table_writer.py explains. Births and marks come from births.py, goals from goals.py:

    "packing": section("Steps of whole rows. {about}", by_class({"": "{case}", "CPU": "{cpu}", "bar": bars})),

A page has blocks, which stand between ``<!-- bench/SCRIPT begins -->`` and ``<!-- bench/SCRIPT ends -->``. Each script
ends with ``command(__doc__, PAGE)``:

python bench/SCRIPT --write
python bench/SCRIPT --check      # exit status 1 if a page differs from the results, or a result lacks its birth
python bench/SCRIPT --marks      # which figures are older than their code
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple

import births
from table_writer import Block, Part, Result, Results, every, fill

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
CLASSES = ("amx", "avx512_bf16", "avx512", "avx2", "scalar", "neon_bf16", "neon")  # of CPUs, as the tables order them
RESIDENCY = {"8B": "residency", "70B": "residency_70b"}  # the shape of Llama 3 -> the name of its results


def results_of(name: str, folder: Path = RESULTS) -> dict[str, Result]:
    """CPU class -> the results of that bench: ``train-avx2.json`` is "train" for "avx2"."""
    files = {cpu: folder / f"{name}-{cpu}.json" for cpu in CLASSES}
    return {cpu: json.loads(file.read_text(encoding="utf-8")) for cpu, file in files.items() if file.exists()}


def between(text: str, script: str, made: str) -> str:
    """``text`` with another text between the marks of a script; a blank line beside the marks stays.

    Raises:
        ValueError: the marks are not there, once each and in this order.
    """
    begin, end = (f"<!-- bench/{script} {word} -->" for word in ("begins", "ends"))
    before, begun, rest = text.partition(begin)
    old, ended, after = rest.partition(end)
    if not begun or not ended or begin in rest or end in after:
        raise ValueError(f"The page must hold {begin} and {end} once each, in this order.")
    gap = "\n\n" if old.startswith("\n\n") else "\n"
    return gap.join([before + begin, made.strip("\n"), end]) + after


class Page(NamedTuple):
    """A file, and what stands there between the marks of each script; ``finish`` changes its whole text."""

    path: Path
    blocks: Mapping[str, Block]
    finish: Callable[[str], str] = str

    def make(self, text: str, folder: Path = RESULTS) -> str:
        """The new text of the old one and a folder of results."""
        for script, block in self.blocks.items():
            text = between(text, script, block(folder))
        return self.finish(text)


def about(results: Results) -> str:
    """The lines that name the script, the machines, the commits and days."""
    script = next(f"bench/bench_{result['bench']}.py" for result in results.values())
    classes: dict[str, list[str]] = {}
    for machine in (result["machine"] for result in results.values()):
        name = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
        classes.setdefault(name, []).append(machine["cpu_isa"])
    machines = "; ".join(f"{name} ({', '.join(found)})" for name, found in classes.items())
    return f"Script: [{script}](../{script}).\n{births.wrapped(f'Machine: {machines}.')}\n{births.text_of(results)}"


def made_by(script: str, result: Result) -> str:
    """The same of one result, in short, with the footnote."""
    machine = result["machine"]
    words = f"{machine['cpu']}, torch {machine['torch']}, {machine['cpu_isa']}"
    made = [f"Made by [{script}](../{script}) ({words}).", births.text_of({machine["cpu_isa"]: result})]
    return "\n".join([line for line in made if line] + [births.FOOTNOTE])


def section(text: str, *parts: str | Part, **said: Part) -> Part:
    """What a page says of a bench, and its tables.

    Args:
        text: with ``{about}``, ``{first[KEY]}`` of the first row and ``{NAME}`` of ``said``.
        parts: tables and lines below the text, with blank lines between them.
    """

    def write(results: Results) -> str:
        values = {"first": every(results)[0], **{name: make(results) for name, make in said.items()}}
        words = fill(cleandoc(text), {"about": about(results), **values})
        return "\n\n".join([words, *(part if isinstance(part, str) else part(results) for part in parts)])

    return write


def of(name: str, part: Part) -> Block:
    """A block about the results of that name, with marks; nothing without any."""

    def make(folder: Path) -> str:
        results = results_of(name, folder)
        return births.marked(name, part(results), results) if results else ""

    return make


def command(description: str | None, *pages: Page) -> None:
    """The command line of a script: write its pages, check them, or list marks.

    Marks of old figures do not count in a check (births.py), which ends the script.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="put the figures into the pages")
    action.add_argument("--check", action="store_true", help="exit 1 if a page has other figures")
    action.add_argument("--marks", action="store_true", help="list the results whose code has changed since")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for page in pages:
        parser.add_argument(f"--{page.path.stem.lower()}", dest=page.path.stem, type=Path, default=page.path)
    arguments = vars(parser.parse_args())
    if arguments["marks"]:
        print("\n".join(births.report(arguments["results"])))
        return
    unborn = births.unborn(arguments["results"])
    if arguments["check"] and unborn:
        sys.exit(f"no commit, date and versions in {', '.join(unborn)}: measure again with --json")
    for page in pages:
        path = arguments[page.path.stem]
        text = path.read_text(encoding="utf-8")
        wanted = page.make(text, arguments["results"])
        if arguments["write"]:
            path.write_text(wanted, encoding="utf-8")
        elif births.without_marks(text) != births.without_marks(wanted):
            sys.exit(f"{path} differs from {arguments['results']}: run python {sys.argv[0]} --write")
