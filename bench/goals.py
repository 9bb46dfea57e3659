"""Every goal of every result, and the one list of those that were missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pages import CLASSES, results_of
from table_writer import Row, table

# What tells the rows of a result apart, in the order in which it is said.
LABELS = ("peer", "optimizer", "case", "setting", "form", "kind", "base", "model", "type", "direction", "dtype")
SIZES = ("n", "k", "m", "r", "length", "limit_gib")
COLUMNS = {"results": "{bench}", "CPU": "{cpu}", "row": "{row}", "goal, and what was measured": "{words}"}


class Goal(NamedTuple):
    """One goal: the bench and the class that it was measured on, the row, its words, and whether it was met."""

    bench: str
    cpu: str
    row: str
    words: str
    met: bool


def met_bars(row: Row) -> list[bool]:
    """Whether each measured bar of a row was met; bars of which one is enough count as one."""
    met = [bar["met"] for bar in row["bars"] if bar["met"] is not None]
    return [any(met)] if met and row.get("either_bar") else met


def words_of(bar: Mapping[str, Any]) -> str:
    """What was asked and what was measured, of the forms that the benches have."""
    if not isinstance(bar["bar"], int | float):
        return f"{bar['bar']}: {bar['value']:g}"
    between = "as" if bar["measure"] == "times as fast" else "of"
    value = "no value" if bar["value"] is None else f"{bar['value']:.4g}"
    rival = f" {between} {bar['rival']}" if bar.get("rival") and not bar["measure"].startswith("of plain") else ""
    at_least = bar.get("at_least", bar["measure"] in ("times as fast", "of the floor"))
    return f"{'at least' if at_least else 'at most'} {bar['bar']:g} {bar['measure']}{rival}: {value}"


def rows_in(part: Any, label: str = "") -> Iterator[tuple[str, Row]]:
    """Label and row of all that has bars in a result, however deep."""
    if isinstance(part, Mapping):
        words = [str(part[key]) for key in LABELS if key in part]
        words += [f"{key}={part[key]}" for key in SIZES if part.get(key) is not None]
        label = " ".join(words) or label
        if isinstance(part.get("bars"), list) and part["bars"]:
            yield label, part
        for key, inner in part.items():
            if key != "bars":
                yield from rows_in(inner, label or key)
    elif isinstance(part, list):
        for inner in part:
            yield from rows_in(inner, label)


def found(folder: Path) -> list[Goal]:
    """Of all results in a folder, as the tables order classes."""
    names = sorted({file.stem.rpartition("-")[0] for cpu in CLASSES for file in folder.glob(f"*-{cpu}.json")})
    goals = []
    for bench, (cpu, result) in ((name, item) for name in names for item in results_of(name, folder).items()):
        for label, row in rows_in(result):
            words = [words_of(bar) for bar in row["bars"] if bar["met"] is not None]
            words = [" or ".join(words)] if words and row.get("either_bar") else words
            goals += [Goal(bench, cpu, label, *goal) for goal in zip(words, met_bars(row), strict=True)]
    return goals


def page(folder: Path) -> str:
    """The list on docs/performance.md."""
    goals = found(folder)
    missed = [goal._asdict() for goal in goals if not goal.met]
    said = f"## Missed goals\n\nOf all {len(goals)} goals, of this page and of the others, {len(missed)} are missed:"
    return f"{said}\n\n{table(COLUMNS, missed)}" if missed else said
