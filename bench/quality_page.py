"""Write the tables of docs/quality.md from bench/results/quality-*.json (command line: pages.py)."""

from __future__ import annotations

import textwrap
from functools import partial

from pages import ROOT, Page, command, made_by, of
from table_writer import Cell, Columns, Result, Results, Row, bars_as, fill, table

from qlora_native.weight import METHODS

BASES = {"bf16": "16-bit (bf16)", **{method: f"`{method}`" for method in METHODS}}  # results have one that is gone
METHOD: Columns = {
    "": lambda row: BASES[row["base"]],
    "perplexity": "{perplexity:.2f}",
    "nats a token above 16-bit": "{excess:±}",
    "KL to 16-bit": "{kl:±}",
    "same first token": "{same_first:±1 %}",
    "gap closed": "{closed:±0 %}",
    "bar": bars_as("at least {bar:percent}: {met:met}"),
}
LEARNED = """\
The next table is after fine-tuning.
Each run takes {steps} steps of {rows} x {length} tokens from the training modules.
The adapter has rank {r} and alpha {alpha} on every linear layer.
The optimizer is AdamW with warm-up and cosine.
The gap is the end loss above that of the adapter on the 16-bit base with the same batches, in nats a token.
It is measured on the first {evaluated_rows} windows of each text.
Figures are the mean of {runs} runs: seeds {said_seeds} at peak rates {said_rates}."""


def methods(result: Result) -> list[str]:
    """The loss of each method, one table a text."""
    rows = [row for row in result["rows"] if row["kind"] == "method" and row["base"] in BASES]
    parts = []
    for name, text in result["texts"].items():
        if name not in rows[0]["texts"]:
            continue
        said = fill("**{name}**: {about}; {rows} windows of {length} tokens.", {"name": name, **text})
        bars = [[bar for bar in row["bars"] if bar["measure"].endswith(name)] for row in rows]
        found = [{**row, **row["texts"][name], "bars": own} for row, own in zip(rows, bars, strict=True)]
        parts += [textwrap.fill(said, 120), table(METHOD, found)]
    return parts


def by_rate(text: str, row: Row) -> str:
    """The mean and range of the gaps at each rate; the 16-bit base has none."""
    said = "{0}: {1:.3f} ({2:.3f} to {3:.3f})"
    gaps = row["texts"][text].get("gaps", {})
    return "; ".join(said.format(rate, sum(v) / len(v), min(v), max(v)) for rate, v in gaps.items() if v)


def learning(result: Result) -> list[str]:
    """The loss after fine-tuning."""
    rows, setting = [row for row in result["rows"] if row["kind"] == "lora"], result["lora"]
    if not rows:
        return []
    seeds, rates = ", ".join(map(str, setting["seeds"])), " and ".join(f"{rate:g}" for rate in setting["rates"])
    said = fill(LEARNED, {**setting, "runs": rows[0]["runs"], "said_seeds": seeds, "said_rates": rates})
    columns: dict[str, Cell] = {"base": lambda row: BASES[row["base"]]}
    for text in rows[0]["texts"]:
        columns[f"end loss on {text}"] = f"{{texts[{text}][loss]:.3f}}"
        columns[f"gap on {text}"] = f"{{texts[{text}][gap]:.3f}}"
        columns[f"by rate on {text}"] = partial(by_rate, text)
    columns["bar"] = bars_as("at most {bar:g} {measure}: {value:.2f}, {met:met}")
    return [said, table(columns, rows)]


def losses(results: Results) -> str:
    """All tables of each result."""
    parts = []
    for result in results.values():
        parts += [made_by("bench/bench_quality.py", result), *methods(result)]
        parts += ["![What is lost](quality.png)", *learning(result)]
    return "\n\n".join(parts)


PAGE = Page(ROOT / "docs/quality.md", {"quality_page.py": of("quality", losses)})

if __name__ == "__main__":
    command(__doc__, PAGE)
