"""The lines that readme.py puts into README.md from bench/results/start-*.json: what its two commands take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import births
from pages import table

Results = Mapping[str, dict[str, Any]]  # CPU class -> what bench_start found there


def minutes(seconds: float) -> str:
    """As 3:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def rows(results: Results) -> list[list[str]]:
    """A row for each command and CPU class."""
    found = []
    for name in ("demo", "test"):
        for cpu, result in results.items():
            by_nvcc = {row["nvcc"]: row for row in result["rows"] if row["command"] == name}
            if False not in by_nvcc:
                continue
            row, compiled = by_nvcc[False], by_nvcc.get(True)
            install = minutes(row["install_seconds"])
            install += f" ({minutes(compiled['install_seconds'])})" if compiled else ""
            size, small = ((row[key] + row["model_mb"]) / 1e3 for key in ("index_mb", "download_mb"))
            found.append([name, cpu, f"{size:.1f} GB", f"{small:.2f} GB", install, minutes(row["run_seconds"])])
    return found


def shown(results: Results) -> list[str]:
    """What the demo prints, of the first class that has it."""
    for result in results.values():
        for row in result["rows"]:
            if row["command"] == "demo" and not row["nvcc"]:
                return str(row["printed"]).splitlines()
    return []


def headline(results: Results) -> list[str]:
    """The table under the two commands, and what the demo prints."""
    head = ["", "CPU class", "download", "with torch's CPU build", "minutes to install (with `nvcc`)", "to run"]
    born = (result["birth"] for result in results.values())
    commits = ", ".join(dict.fromkeys(f"{birth['commit'][:7]} of {birth['date']}" for birth in born))
    return [
        *births.marked("start", table(head, rows(results)), results),
        f"On two cores without a cache, the demo's model counted (commit {commits}).",
        "The task is to write the first line of a docstring of Python's standard library; `--model` takes a larger",
        "[file](docs/any-file.md#try-it-on-a-real-file):",
        "",
        "~~~",
        *shown(results),
        "~~~",
    ]
