"""Time against M of the contenders of bench_linear, with the floor, as a picture. Needs matplotlib.

python bench/plot_linear.py bench/results/linear-avx512_bf16.json docs/linear.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import source

# Name in the JSON, label, color, line.
LINES = (
    ("ours", "qlora_native, NF4", "#c2410c", "-"),
    ("bf16", "torch, bf16", "#1d4ed8", "-"),
    ("fp32", "torch, fp32", "#1d4ed8", "-"),
    ("ours_fp32", "qlora_native, NF4, fp32 activations", "#c2410c", ":"),
    ("onednn_prepacked", "oneDNN prepacked", "#0e7490", "-"),
    ("bitsandbytes", "bitsandbytes NF4, training", "#6b7280", "-"),
    ("bitsandbytes_inference", "bitsandbytes NF4, inference only", "#6b7280", ":"),
    ("ggml_iq4_nl", "ggml IQ4_NL, x in 8 bits", "#4d7c0f", ":"),
)


def draw(result: dict[str, Any], path: str) -> None:
    """One panel for each N, forward; quartiles as bands."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = [r for r in result["rows"] if r["direction"] == "forward"]
    shapes = sorted({(r["n"], r["k"]) for r in rows})
    figure = Figure(figsize=(5.4 * len(shapes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axis, (n, k) in zip(panels, shapes, strict=True):
        chosen = sorted((r for r in rows if (r["n"], r["k"]) == (n, k)), key=lambda r: r["m"])
        axis.plot(
            [r["m"] for r in chosen], [r["floor_ms"] for r in chosen], "--", color="black", linewidth=1, label="floor"
        )
        for name, label, color, style in LINES:
            points = [(r["m"], *r["ms"][name]) for r in chosen if name in r["ms"]]
            if not points:
                continue
            m, low, middle, high = zip(*points, strict=True)
            axis.plot(m, middle, style, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
            axis.fill_between(m, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", title=f"y = x Wᵀ, W {n} x {k}")
        axis.set(xlabel="M, rows of x (log scale)", ylabel="ms a product, median and quartiles (log scale)")
        ticks = [r["m"] for r in chosen]
        axis.set_xticks(ticks, [str(m) for m in ticks])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']}; torch {machine['torch']}", fontsize=9
    )
    figure.savefig(path, dpi=130, metadata=source(result))


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json", help="what bench_linear.py wrote")
    parser.add_argument("png", help="the picture")
    arguments = parser.parse_args()
    draw(json.loads(Path(arguments.json).read_text(encoding="utf-8")), arguments.png)


if __name__ == "__main__":
    main()
