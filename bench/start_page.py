"""The lines that readme.py puts into README.md from bench/results/start-*.json: what its two commands take."""

from __future__ import annotations

from collections.abc import Iterable

import births
from pages import of
from table_writer import Columns, Results, Row, every, table


def minutes(seconds: float) -> str:
    """As 3:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def installing(row: Row) -> str:
    """The time without nvcc and, where it was measured, with it."""
    without = minutes(row["install_seconds"])
    return f"{without} ({minutes(row['compiled']['install_seconds'])})" if row["compiled"] else without


COLUMNS: Columns = {
    "": "{command}",
    "CPU class": "{cpu}",
    "download": lambda row: f"{(row['index_mb'] + row['model_mb']) / 1e3:.1f} GB",
    "with torch's CPU build": lambda row: f"{(row['download_mb'] + row['model_mb']) / 1e3:.2f} GB",
    "minutes to install (with `nvcc`)": installing,
    "to run": lambda row: minutes(row["run_seconds"]),
}


def rows(results: Results) -> Iterable[Row]:
    """A row for each command and CPU class, with that of the same where nvcc compiled."""
    for name in ("demo", "test"):
        for cpu, result in results.items():
            by_nvcc = {row["nvcc"]: row for row in result["rows"] if row["command"] == name}
            if False in by_nvcc:
                yield {**by_nvcc[False], "cpu": cpu, "compiled": by_nvcc.get(True)}


def headline(results: Results) -> str:
    """The table under the two commands, and what the demo prints, of the first class that has it."""
    printed = [row["printed"] for row in every(results) if row["command"] == "demo" and not row["nvcc"]]
    return f"""
{table(COLUMNS, rows(results))}

On two cores without a cache, the demo's model counted (commit {births.commits(results)}).
The task is to write the first line of a docstring of Python's standard library; `--model` takes a larger
[file](docs/any-file.md#try-it-on-a-real-file):

~~~
{printed[0] if printed else ""}
~~~
"""


BLOCK = of("start", headline)
