"""The one writer of tables, which specs feed.

A spec is the columns of a table by header, each a format string over a row's keys (FORMATS are its formats beside
Python's) or a function of a row, and which rows of a result it takes:

    by_class({"": "{case}", "CPU": "{cpu}", "ms": "{ms[ours]:spread}", "bar": bars}, only(part="train"))

is a function of the results of all CPU classes, which stand side by side in the order of pages.CLASSES. What a row
lacks is an empty cell, and a column that no row has is left out.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Result = dict[str, Any]
Results = Mapping[str, Result]  # CPU class -> what a bench found there
Cell = str | Callable[[Row], str | None]
Columns = Mapping[str, Cell]
Rows = Callable[[Result], Iterable[Row]]
Part = Callable[[Results], str]  # of a page
Block = Callable[[Path], str]  # what stands between two marks, of a folder of results


def every(results: Results) -> list[Row]:
    """The rows of all classes."""
    return [row for result in results.values() for row in result["rows"]]


def number(value: float) -> str:
    """Three significant digits, thousands with a comma."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(quartiles: Sequence[float]) -> str:
    """Median and quartiles."""
    return f"{number(quartiles[1])} ({number(quartiles[0])}-{number(quartiles[2])})"


def times(quartiles: Sequence[float]) -> str:
    """How many times as fast as a peer we are, of the quartiles of our time over its."""
    ratio = 1 / quartiles[1]
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


FORMATS: dict[str, Callable[[Any], str]] = {
    "number": number,
    "median": lambda quartiles: number(quartiles[1]),
    "spread": spread,
    "times": times,
    "percent": lambda share: f"{100 * share:.0f} %",
    "error": lambda share: f"{100 * share:+.1f} %",
    "losses": lambda losses: " -> ".join(f"{loss:.3f}" for loss in losses),
    "losses4": lambda losses: " -> ".join(f"{loss:.4f}" for loss in losses),
    "end": lambda losses: f"{losses[-1]:.3f}",
    "±": lambda pair: f"{pair[0]:.3f} ± {pair[1]:.3f}",  # a figure and its standard error
    "±1 %": lambda pair: f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f} %",
    "±0 %": lambda pair: f"{100 * pair[0]:.0f} ± {100 * pair[1]:.0f} %",
    "MB": lambda count: f"{count / 1e6:,.0f} MB",
    "GB": lambda count: f"{count / 1e9:.1f} GB",
    "MiB": lambda count: f"{count / 2**20:.1f}",
    "GiB": lambda count: f"{count / 2**30:.1f} GiB",
    "speed": lambda quartiles: spread([1 / ratio for ratio in reversed(quartiles)]),  # of times over a peer's
    "met": lambda met: "met" if met else "missed",
    "least": lambda at_least: "at least" if at_least else "at most",
}


class _Cells(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        return FORMATS[format_spec](value) if format_spec in FORMATS else format(value, format_spec)


def fill(text: str, row: Row) -> str:
    """A format string with the values of a row."""
    return _Cells().vformat(text, (), row)


def cell_of(cell: Cell, row: Row) -> str | None:
    """The text of a cell; None if its format names a key that the row lacks."""
    if not isinstance(cell, str):
        return cell(row)
    try:
        return fill(cell, row)
    except KeyError:
        return None


def bars_as(text: str) -> Cell:
    """A cell of all bars of a row, each in this format."""
    return lambda row: "; ".join(fill(text, bar) for bar in row["bars"])


def markdown(head: Sequence[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *body))
    return "\n".join([first, "|" + "---|" * len(head), *rest])


def table(columns: Columns, rows: Iterable[Row]) -> str:
    """The same of these columns; rows that are equal before a column "CPU" stand together."""
    body = [[cell_of(cell, row) for cell in columns.values()] for row in rows]
    keys = list(columns).index("CPU") if "CPU" in columns else 0
    order = list(dict.fromkeys(tuple(cells[:keys]) for cells in body))
    body.sort(key=lambda cells: order.index(tuple(cells[:keys])))
    there = [not body or any(cells[place] is not None for cells in body) for place in range(len(columns))]
    return markdown(list(compress(columns, there)), ([cell or "" for cell in compress(cells, there)] for cells in body))


def by_class(columns: Columns, rows: Rows = itemgetter("rows")) -> Part:
    """A table of all CPU classes, of which the rows have the key "cpu".

    Args:
        rows: those of one result.
    """
    return lambda results: table(
        columns, ({**row, "cpu": cpu} for cpu, result in results.items() for row in rows(result))
    )


def only(**values: Any) -> Rows:
    """Of a result, the rows that have these values, or one of a tuple."""
    allowed = {key: value if isinstance(value, tuple) else (value,) for key, value in values.items()}
    return lambda result: [row for row in result["rows"] if all(row.get(key) in allowed[key] for key in allowed)]


def each(text: str, rows: Rows = itemgetter("rows"), between: str = "; ") -> Part:
    """What a format string makes of rows, each text once."""
    return lambda results: between.join(dict.fromkeys(fill(text, row) for r in results.values() for row in rows(r)))
