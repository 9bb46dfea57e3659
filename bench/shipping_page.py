"""Write the tables of docs/shipping.md and the picture docs/shipping.png from bench/results/shipping-*.json.

python bench/shipping_page.py --write
python bench/shipping_page.py --check      # exit status 1 if docs/shipping.md differs from the result
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import births
from pages import between, results_of, source, table, write_or_check

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs/shipping.md", ROOT / "docs/shipping.png"
BEGIN, END = "<!-- bench/shipping_page.py begins -->", "<!-- bench/shipping_page.py ends -->"
TEXTS = {"docstrings": "first lines of docstrings", "reference": "pages of the language reference"}
NAMES = {
    "plain": "adapter beside the 4-bit base",
    "bf16-base": "16 bits, from the 4-bit base",
    "bf16-original": "16 bits, from the original",
    "rtn-base": "NF4 to nearest, from the 4-bit base",
    "rtn-original": "NF4 to nearest, from the original",
    "gptq-base": "NF4 by `gptq`, from the 4-bit base",
    "gptq-original": "NF4 by `gptq`, from the original",
    "shipped": "NF4 by `lora.ship`, after the last step",
}


def tables(result: dict[str, Any]) -> list[str]:
    """One table for each setting, and the bars."""
    training, lines = result["training"], []
    for setting, rate in training["rates"].items():
        rows = {row["form"]: row for row in result["rows"] if row["setting"] == setting}
        if not rows:
            continue
        texts = list(rows["plain"]["texts"])
        seeds = {text: list(rows["plain"]["texts"][text]["seeds"]) for text in texts}
        counts = " and ".join(f"{len(seeds[text])} of {TEXTS[text]}" for text in texts)
        lines += [f"**{setting}**: {training['steps']} steps at {rate:g}; seeds: {counts}.", ""]
        body = []
        for form, name in NAMES.items():
            cells = [name]
            for text in texts:
                found = rows[form]["texts"][text]
                cells += [f"{found['losses'][2]:.4f}", kept(found) if form != "plain" else "1"]
            bars = "; ".join(f"{bar['measure']}: {bar['value']:.3g}, {state(bar)}" for bar in rows[form]["bars"])
            body.append([*cells, bars])
        base = [f"{rows['plain']['texts'][text]['losses'][0]:.4f}" for text in texts]
        body.insert(0, ["4-bit base", *(cell for loss in base for cell in (loss, "0")), ""])
        lines += table(
            ["", *(f"{what}, {TEXTS[text]}" for text in texts for what in ("loss", "retention")), "bars"], body
        )
    return lines


def kept(found: dict[str, Any]) -> str:
    """Retention with its standard error, and the range of the seeds."""
    value, error = found["retention"]
    seeds = found["seeds"].values()
    spread = f" ({min(seeds):.2f} to {max(seeds):.2f})" if len(seeds) > 1 else ""
    return f"{value:.3f} ± {error:.3f}{spread}"


def state(bar: dict[str, Any]) -> str:
    """What was asked, and whether it was met."""
    return f"{'at least' if bar['at_least'] else 'at most'} {bar['bar']:g} {'met' if bar['met'] else 'missed'}"


def block(result: dict[str, Any]) -> str:
    """The lines between the marks of the page."""
    machine = result["machine"]
    cpu = machine["cpu_isa"]
    about = f"{machine['cpu']}, torch {machine['torch']}, {cpu}"
    script = "[bench/bench_shipping.py](../bench/bench_shipping.py)"
    lines = [
        f"Made by {script} ({about}).",
        *births.lines({cpu: result}),
        births.FOOTNOTE,
        f"The calibration text of a merge is {result['training']['calibration_rows']} of the training rows.",
        "",
    ]
    lines += [*tables(result), "![Retention of each form](shipping.png)", ""]
    return "\n".join(births.marked("shipping", lines, {cpu: result}))


def plot(result: dict[str, Any], path: Path) -> None:
    """Retention of the 4-bit forms with standard errors, a panel for each setting."""
    from matplotlib.figure import Figure

    forms = [form for form in NAMES if form not in ("plain", "bf16-base", "bf16-original")]
    settings = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        rows = {row["form"]: row for row in result["rows"] if row["setting"] == setting}
        texts = list(rows["plain"]["texts"])
        height = 0.8 / len(texts)
        for number, text in enumerate(texts):
            found = [rows[form]["texts"][text]["retention"] for form in forms]
            places = [at + (number - (len(texts) - 1) / 2) * height for at in range(len(forms))]
            values, errors = ([pair[side] for pair in found] for side in (0, 1))
            axes.barh(places, values, height, xerr=errors, label=TEXTS[text], capsize=2)
        axes.axvline(1, color="black", linewidth=0.6)
        axes.set_yticks(range(len(forms)), [NAMES[form].replace("`", "") for form in forms])
        axes.set_title(f"{setting} run, peak rate {result['training']['rates'][setting]:g}")
        axes.set_xlabel("retention (1: all that the adapter learned)")
    panels[0].invert_yaxis()
    panels[0].set_ylabel("form that ships")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize="small")
    figure.savefig(path, dpi=120, metadata=source(result))


def main() -> None:
    """Write or check."""
    results = list(results_of("shipping").values())
    blocks = list(map(block, results))
    write_or_check(__doc__, PAGE, lambda text: between(text, BEGIN, END, blocks), "bench/results/shipping-*.json")
    if results:
        plot(results[0], PICTURE)


if __name__ == "__main__":
    main()
