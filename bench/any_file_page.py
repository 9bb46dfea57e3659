"""Write the tables of docs/any-file.md from bench/results/residency*.json and gguf-*.json.

python bench/any_file_page.py --write
python bench/any_file_page.py --check      # exit status 1 if docs/any-file.md differs from the results
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import births
from goals import met_bars
from pages import RESIDENCY, Result, results_of, rewritten, side_by_side, table, write_or_check
from readme import about, number, spread

PAGE = Path(__file__).parents[1] / "docs/any-file.md"
HEAD = ["shape, file", "CPU", "disk reads", "memory", "tokens a step", "peak RSS", "tokens/s", "bars"]


def residency() -> list[str]:
    """Training under memory limits; opening a mapped folder and computing with it, where that was measured."""
    results = [(shape, result) for shape, name in RESIDENCY.items() for result in results_of(name).values()]
    lines = table(HEAD, [cells for shape, result in results for cells in trained(shape, result)])
    lines += [f"{shape}: {line}" for shape, name in RESIDENCY.items() for line in births.lines(results_of(name))]
    lines += [births.FOOTNOTE, ""]
    for shape, result in results:
        for row in result["rows"]:
            if "estimates" in row:
                before, after = (number(one["tokens_per_second"]) for one in row["estimates"])
                lines += [
                    f"For {shape} `qlora estimate` said {before} tokens/s before the run and {after} after it; "
                    f"the run made {number(row['tokens_per_second'])}.",
                    "The speed of that machine, its disk's too, drifts within minutes.",
                    "",
                ]
    body = [
        [
            shape,
            side,
            result["machine"]["cpu_isa"],
            f"{found['seconds']:.2f} s",
            f"{found['private_mib'] * 1.048576:,.0f} MB",
            *compared(side, result),
        ]
        for shape, result in results
        if "open" in result
        for side, found in result["open"].items()
        if side != "bars"
    ]
    head = ["shape", "weights", "CPU", "opens in", "private memory", "a step", "bars"]
    lines += table(head, body) if body else []
    for name in RESIDENCY.values():
        lines = births.marked(name, lines, results_of(name))
    return lines


def trained(shape: str, result: Result) -> list[list[str]]:
    """A line for each run of a result."""
    cells = [f"{shape}, {result['file_bytes'] / 1e9:.1f} GB", result["machine"]["cpu_isa"]]
    disk, lines = f"{result['disk_bytes_per_second'] / 1e6:,.0f} MB/s", []
    for row in result["rows"]:
        limit = "no limit" if row["limit_gib"] is None else f"{row['limit_gib']:g} GiB"
        words = [disk, limit, f"{row['tokens']:,}", f"{row['peak_rss'] / 1e9:.1f} GB"]
        lines.append([*cells, *words, number(row["tokens_per_second"]), verdicts(row)])
    return lines


def compared(side: str, result: Result) -> list[str]:
    """Of the mapped weights: the time of a step against those in memory, and the bars."""
    if side != "mapped":
        return ["", ""]
    steps: dict[str, Any] = result.get("steps", {"bars": []})
    ratio = f"{steps['median_ratio']:.3f} x" if "median_ratio" in steps else ""
    return [ratio, verdicts({"bars": [*result["open"]["bars"], *steps["bars"]]})]


def verdicts(row: Result) -> str:
    """Each bar with its value and whether it was met."""
    return "; ".join(f"{bar['bar']}: {bar['value']:g}, {'met' if bar['met'] else 'missed'}" for bar in row["bars"])


def gguf() -> list[str]:
    """Products with GGUF's formats: one token against ggml, more against NF4."""
    results = results_of("gguf")
    if not results:
        return ["No result is stored yet; `python bench/bench_gguf.py --json` makes one.", ""]
    many = sorted({row["m"] for result in results.values() for row in result["rows"] if row["m"] > 1})
    bodies = {cpu: list(formats(result["rows"], many)) for cpu, result in results.items()}
    head = ["", "one token, GB/s", "x ggml's speed", *(f"{m}, {way}" for m in many for way in ("forward", "gradient"))]
    rows = [row for result in results.values() for row in result["rows"]]
    met = [one for row in rows for one in met_bars(row)]
    unknown = any(bar["met"] is None for row in rows for bar in row["bars"])
    page = [
        "At one token: the rate at which the weight's bytes are read, and the speed relative to ggml's own product.",
        "With more tokens: the time relative to a product with NF4 of the same shape.",
        "Medians with quartiles, of runs that take turns.",
        about(results),
        "",
        *side_by_side(head, bodies),
        "Goals: from 64 tokens on at most 1.15 times NF4's time, forward and gradient.",
        "At one token at least 0.8 times ggml's speed with Q4_0, Q4_1 and Q8_0.",
        f"Of these {len(met)} goals {sum(met)} are met."
        + (" Where ggml was not installed, its goals are not counted." if unknown else ""),
        *without_goal(results),
        births.FOOTNOTE,
        "",
    ]
    return births.marked("gguf", page, results)


def without_goal(results: Mapping[str, Result]) -> Iterable[str]:
    """The speeds at one token, relative to ggml's, of the formats that have no goal there."""
    for cpu, result in results.items():
        rows = [row for row in result["rows"] if row["m"] == 1 and not row["bars"] and "ggml" in row["ours_over"]]
        speeds = ", ".join(f"{row['type'].upper()} {1 / row['ours_over']['ggml'][1]:.2f}" for row in rows)
        if speeds:
            yield f"The other formats have no goal at one token; relative to ggml's their speed is ({cpu}):"
            yield f"{speeds}."


def formats(rows: Iterable[Result], many: list[int]) -> Iterable[list[str]]:
    """A line for each format."""
    found = {(row["type"], row["m"], row["direction"]): row for row in rows}
    for name in dict.fromkeys(name for name, *_ in found):
        cells = [name.upper()]
        one = found.get((name, 1, "forward"))
        low, middle, high = one["ours_over"].get("ggml", (0, 0, 0)) if one else (0, 0, 0)
        cells += [f"{one['gb_per_s']:g}" if one else "", spread((1 / high, 1 / middle, 1 / low)) if low else ""]
        for m in many:
            for direction in ("forward", "grad_input"):
                row = found.get((name, m, direction))
                cells.append(spread(row["ours_over"]["nf4"]) if row else "")
        yield cells


page = partial(rewritten, "any_file_page.py", {"residency": residency, "gguf": gguf})

if __name__ == "__main__":
    write_or_check(__doc__, PAGE, page, "bench/results")
