"""Write the tables of docs/shipping.md from bench/results/shipping-*.json (command line: pages.py)."""

from __future__ import annotations

from functools import partial

from pages import ROOT, Page, command, made_by, of
from table_writer import Cell, Result, Results, Row, bars_as, fill, only, table

TEXTS = {"docstrings": "first lines of docstrings", "reference": "pages of the language reference"}
NAMES = {
    "base": "4-bit base",
    "plain": "adapter beside the 4-bit base",
    "bf16-base": "16 bits, from the 4-bit base",
    "bf16-original": "16 bits, from the original",
    "rtn-base": "NF4 to nearest, from the 4-bit base",
    "rtn-original": "NF4 to nearest, from the original",
    "gptq-base": "NF4 by `gptq`, from the 4-bit base",
    "gptq-original": "NF4 by `gptq`, from the original",
    "shipped": "NF4 by `lora.ship`, after the last step",
}


def kept(text: str, row: Row) -> str:
    """Retention with its standard error, and the range of the seeds."""
    if row["form"] in ("base", "plain"):
        return "0" if row["form"] == "base" else "1"
    found = row["texts"][text]
    seeds = found["seeds"].values()
    return fill("{retention:±}", found) + (f" ({min(seeds):.2f} to {max(seeds):.2f})" if len(seeds) > 1 else "")


def settings(result: Result) -> list[str]:
    """One table for each setting."""
    training, parts = result["training"], []
    for setting, rate in training["rates"].items():
        rows = {row["form"]: row for row in only(setting=setting)(result)}
        if not rows:
            continue
        texts = rows["plain"]["texts"]
        base = {text: {"losses": [None, None, found["losses"][0]]} for text, found in texts.items()}
        rows["base"] = {"form": "base", "texts": base, "bars": []}
        columns: dict[str, Cell] = {"": lambda row: NAMES[row["form"]]}
        for text in texts:
            columns[f"loss, {TEXTS[text]}"] = f"{{texts[{text}][losses][2]:.4f}}"
            columns[f"retention, {TEXTS[text]}"] = partial(kept, text)
        columns["bars"] = bars_as("{measure}: {value:.3g}, {at_least:least} {bar:g} {met:met}")
        seeds = " and ".join(f"{len(found['seeds'])} of {TEXTS[text]}" for text, found in texts.items())
        parts.append(f"**{setting}**: {training['steps']} steps at {rate:g}; seeds: {seeds}.")
        parts.append(table(columns, (rows[form] for form in NAMES)))
    return parts


def retention(results: Results) -> str:
    """All tables of each result."""
    parts = []
    for result in results.values():
        rows = result["training"]["calibration_rows"]
        parts.append(made_by("bench/bench_shipping.py", result))
        parts[-1] += f"\nThe calibration text of a merge is {rows} of the training rows."
        parts += [*settings(result), "![Retention of each form](shipping.png)"]
    return "\n\n".join(parts)


PAGE = Page(ROOT / "docs/shipping.md", {"shipping_page.py": of("shipping", retention)})

if __name__ == "__main__":
    command(__doc__, PAGE)
