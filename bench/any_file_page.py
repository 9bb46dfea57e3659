"""Write the tables of docs/any-file.md from results/residency*.json and gguf-*.json (command line: pages.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import births
from goals import met_bars
from pages import RESIDENCY, ROOT, Page, about, command, of, results_of
from table_writer import Columns, Result, Results, Row, bars_as, by_class, every, fill, only, table, times

VERDICTS = bars_as("{bar}: {value:g}, {met:met}")
TRAINED: Columns = {
    "shape, file": "{shape}, {file_bytes:GB}",
    "CPU": "{cpu}",
    "disk reads": "{disk_bytes_per_second:MB}/s",
    "memory": lambda row: "no limit" if row["limit_gib"] is None else f"{row['limit_gib']:g} GiB",
    "tokens a step": "{tokens:,}",
    "peak RSS": "{peak_rss:GB}",
    "tokens/s": "{tokens_per_second:number}",
    "bars": VERDICTS,
}
OPENED: Columns = {
    "shape": "{shape}",
    "weights": "{weights}",
    "CPU": "{cpu}",
    "opens in": "{seconds:.2f} s",
    "private memory": lambda row: f"{row['private_mib'] * 1.048576:,.0f} MB",
    "a step": "{median_ratio:.3f} x",
    "bars": VERDICTS,
}
ESTIMATED = """\
For {shape} `qlora estimate` said {estimates[0][tokens_per_second]:number} tokens/s before the run and \
{estimates[1][tokens_per_second]:number} after it; the run made {tokens_per_second:number}.
The speed of that machine, its disk's too, drifts within minutes."""
WAYS = {"forward": "forward", "grad_input": "gradient"}


def opened(result: Row) -> Iterator[Row]:
    """Opening a folder in memory and mapped, if that was measured; of the latter a step's time against the other."""
    found = result.get("open", {})
    steps = {"bars": [], **result.get("steps", {})}
    if "memory" in found:
        yield {**result, **found["memory"], "weights": "memory", "bars": []}
    if "mapped" in found:
        yield {**result, **steps, **found["mapped"], "weights": "mapped", "bars": [*found["bars"], *steps["bars"]]}


def residency(folder: Path) -> str:
    """Training under memory limits; opening a mapped folder and computing with it, where that was measured."""
    of_shape = {shape: results_of(name, folder) for shape, name in RESIDENCY.items()}
    found = [
        {"shape": shape, "cpu": cpu, **result} for shape, results in of_shape.items() for cpu, result in results.items()
    ]
    rows = [{**result, **row} for result in found for row in result["rows"]]
    openings = [row for result in found for row in opened(result)]
    born = [f"{shape}: {line}" for shape in of_shape for line in births.text_of(of_shape[shape]).splitlines()]
    parts = [table(TRAINED, rows), "\n".join([*born, births.FOOTNOTE])]
    parts += [fill(ESTIMATED, row) for row in rows if "estimates" in row]
    text = "\n\n".join([*parts, table(OPENED, openings)] if openings else parts)
    for shape, name in RESIDENCY.items():
        text = births.marked(name, text, of_shape[shape])
    return text


def formats(results: Results) -> str:
    """A line for each format, with one token and with more."""
    many = sorted({row["m"] for row in every(results)} - {1})
    columns: Columns = {
        "": lambda row: row["type"].upper(),
        "CPU": "{cpu}",
        "one token, GB/s": "{forward1[gb_per_s]:g}",
        "x ggml's speed": "{forward1[ours_over][ggml]:speed}",
        **{f"{m}, {WAYS[way]}": f"{{{way}{m}[ours_over][nf4]:spread}}" for m in many for way in WAYS},
    }

    def by_type(result: Result) -> Iterable[Row]:
        found: dict[str, dict[str, Any]] = {}
        for row in result["rows"]:
            found.setdefault(row["type"], {"type": row["type"]})[f"{row['direction']}{row['m']}"] = row
        return found.values()

    return by_class(columns, by_type)(results)


def without_goal(results: Results) -> Iterator[str]:
    """The speeds at one token, relative to ggml's, of the formats that have no goal there."""
    for cpu, result in results.items():
        rows = [row for row in only(m=1)(result) if not row["bars"] and "ggml" in row["ours_over"]]
        if rows:
            yield f"The other formats have no goal at one token; relative to ggml's their speed is ({cpu}):"
            yield ", ".join(f"{row['type'].upper()} {times(row['ours_over']['ggml'])}" for row in rows) + "."


def products(results: Results) -> str:
    """Products with GGUF's formats: one token against ggml, more against NF4."""
    met = [one for row in every(results) for one in met_bars(row)]
    unknown = any(bar["met"] is None for row in every(results) for bar in row["bars"])
    return f"""
At one token: the rate at which the weight's bytes are read, and the speed relative to ggml's own product.
With more tokens: the time relative to a product with NF4 of the same shape.
Medians with quartiles, of runs that take turns.
{about(results)}

{formats(results)}

Goals: from 64 tokens on at most 1.15 times NF4's time, forward and gradient.
At one token at least 0.8 times ggml's speed with Q4_0, Q4_1 and Q8_0.
Of these {len(met)} goals {sum(met)} are met.{" Where ggml was not installed, its goals are not counted." * unknown}
{chr(10).join([*without_goal(results), births.FOOTNOTE])}
"""


def gguf(folder: Path) -> str:
    """The block of these."""
    return of("gguf", products)(folder) or "No result is stored yet; `python bench/bench_gguf.py --json` makes one."


PAGE = Page(ROOT / "docs/any-file.md", {"any_file_page.py residency": residency, "any_file_page.py gguf": gguf})

if __name__ == "__main__":
    command(__doc__, PAGE)
