"""Write the tables of docs/quality.md and the picture docs/quality.png from bench/results/quality-*.json.

python bench/quality_page.py --write
python bench/quality_page.py --check      # exit status 1 if docs/quality.md differs from the result
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import births
from pages import between, results_of, source, table, write_or_check

from qlora_native.weight import METHODS

ROOT = Path(__file__).parents[1]
TEXTS = {"A": "library source", "B": "language reference", "C": "package descriptions"}  # what they are, in brief
PAGE, PICTURE = ROOT / "docs/quality.md", ROOT / "docs/quality.png"
BEGIN, END = "<!-- bench/quality_page.py begins -->", "<!-- bench/quality_page.py ends -->"
BASES = ("bf16", *METHODS)  # the results also have a method that is gone
NAMES = {"bf16": "16-bit (bf16)"}


def with_error(pair: Sequence[float], factor: float = 1.0, digits: int = 3) -> str:
    """A figure and its standard error."""
    return f"{factor * pair[0]:.{digits}f} ± {factor * pair[1]:.{digits}f}"


def methods(result: dict[str, Any]) -> list[str]:
    """The loss of each method, one table a text."""
    lines: list[str] = []
    rows = [row for row in result["rows"] if row["kind"] == "method" and row["base"] in BASES]
    texts = {name: text for name, text in result["texts"].items() if name in rows[0]["texts"]}
    for name, text in texts.items():
        about = textwrap.fill(f"**{name}**: {text['about']}; {text['rows']} windows of {text['length']} tokens.", 120)
        lines += [about, ""]
        body = []
        for row in rows:
            found = row["texts"][name]
            cells = [NAMES.get(row["base"], f"`{row['base']}`"), f"{found['perplexity']:.2f}"]
            if "excess" in found:
                cells += [with_error(found["excess"]), with_error(found["kl"])]
                cells += [with_error(found["same_first"], 100, 1) + " %"]
            cells += [""] * (5 - len(cells))
            cells.append(with_error(found["closed"], 100, 0) + " %" if "closed" in found else "")
            bars = [bar for bar in row["bars"] if bar["measure"].endswith(name)]
            cells.append("; ".join(f"at least {100 * bar['bar']:.0f} %: {state(bar)}" for bar in bars))
            body.append(cells)
        head = ["", "perplexity", "nats a token above 16-bit", "KL to 16-bit", "same first token", "gap closed", "bar"]
        lines += table(head, body)
    return lines


def learning(result: dict[str, Any]) -> list[str]:
    """The loss after fine-tuning."""
    rows, setting = [row for row in result["rows"] if row["kind"] == "lora"], result["lora"]
    if not rows:
        return []
    rates = " and ".join(f"{rate:g}" for rate in setting["rates"])
    lines = [
        "The next table is after fine-tuning.",
        f"Each run takes {setting['steps']} steps of {setting['rows']} x {setting['length']} tokens from the training "
        "modules.",
        f"The adapter has rank {setting['r']} and alpha {setting['alpha']} on every linear layer.",
        "The optimizer is AdamW with warm-up and cosine.",
        "The gap is the end loss above that of the adapter on the 16-bit base with the same batches, in nats a token.",
        f"It is measured on the first {setting['evaluated_rows']} windows of each text.",
        f"Figures are the mean of {rows[0]['runs']} runs: seeds {', '.join(map(str, setting['seeds']))} at peak rates "
        f"{rates}.",
        "",
    ]
    head = [
        "base",
        *(f"{what} on {text}" for text in rows[0]["texts"] for what in ("end loss", "gap", "by rate")),
        "bar",
    ]
    body = []
    for row in rows:
        cells = [NAMES.get(row["base"], f"`{row['base']}`")]
        for found in row["texts"].values():
            gaps = found.get("gaps", {})
            by_rate = "; ".join(
                f"{rate}: {sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" for rate, v in gaps.items() if v
            )
            cells += [f"{found['loss']:.3f}", f"{found['gap']:.3f}" if "gap" in found else "", by_rate]
        bars = (f"at most {bar['bar']:g} {bar['measure']}: {bar['value']:.2f}, {state(bar)}" for bar in row["bars"])
        body.append([*cells, "; ".join(bars)])
    return lines + table(head, body)


def state(bar: dict[str, Any]) -> str:
    """Whether a bar was met."""
    return "met" if bar["met"] else "missed"


def block(result: dict[str, Any]) -> str:
    """The lines between the marks of the page."""
    machine = result["machine"]
    cpu = machine["cpu_isa"]
    about = f"{machine['cpu']}, torch {machine['torch']}, {cpu}"
    script = "[bench/bench_quality.py](../bench/bench_quality.py)"
    lines = [f"Made by {script} ({about}).", *births.lines({cpu: result}), births.FOOTNOTE, "", *methods(result)]
    lines += ["![What is lost](quality.png)", "", *learning(result)]
    return "\n".join(births.marked("quality", lines, {cpu: result}))


def plot(result: dict[str, Any], path: Path) -> None:
    """Nats above 16 bits: as quantized, with standard errors; and after fine-tuning, of which there are none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.7), layout="constrained")
    parts = [
        ("as quantized, with standard errors", "method", "excess"),
        ("after LoRA, mean of the runs", "lora", "gap"),
    ]
    for axes, (title, kind, key) in zip(figure.subplots(1, 2), parts, strict=True):
        rows = [row for row in result["rows"] if row["kind"] == kind and row["base"] in METHODS]
        texts = list(rows[0]["texts"]) if rows else []
        for number, text in enumerate(texts):
            width = 0.8 / len(texts)
            places = [at + (number - (len(texts) - 1) / 2) * width for at in range(len(rows))]
            values = [row["texts"][text][key] for row in rows]
            heights, errors = zip(*values, strict=True) if key == "excess" else (values, None)
            label = f"{text}: {TEXTS[text]}" if text in TEXTS else text
            axes.bar(places, heights, width, yerr=errors, label=label, capsize=2)
        axes.set_xticks(range(len(rows)), [row["base"] for row in rows])
        axes.set(title=title, xlabel="method of quantizing")
        axes.set_ylabel("nats a token above the 16-bit base")
        if texts:
            options = {"frameon": False, "fontsize": "small", "columnspacing": 1, "handlelength": 1}
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(texts), **options)
    figure.savefig(path, dpi=120, metadata=source(result))


def main() -> None:
    """Write or check."""
    results = list(results_of("quality").values())
    blocks = list(map(block, results))
    write_or_check(__doc__, PAGE, lambda text: between(text, BEGIN, END, blocks), "bench/results/quality-*.json")
    plot(results[0], PICTURE)


if __name__ == "__main__":
    main()
