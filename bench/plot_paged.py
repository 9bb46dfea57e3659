"""Time of a step against the share of states that is out of memory, as a picture. Needs matplotlib.

python bench/plot_paged.py bench/results/paged-avx512_bf16.json docs/paged.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import source

# Name in the JSON, label, color; they keep their states in memory whatever the share.
LEVELS = (
    ("unpaged", "qlora_native, paged=False", "#c2410c"),
    ("torch fused", "torch fused", "#1d4ed8"),
    ("bitsandbytes PagedAdamW", "bitsandbytes PagedAdamW, unpaged on a CPU", "#6b7280"),
    ("torchao CPUOffloadOptimizer", "torchao CPUOffloadOptimizer", "#0e7490"),
)


def draw(result: dict[str, Any], path: str) -> None:
    """Medians as a line, quartiles as a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = sorted((r for r in result["rows"] if r["case"] == "shares"), key=lambda r: r["paged_out"])
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.add_subplot()
    x = [100 * row["paged_out"] for row in rows]
    low, middle, high = zip(*(row["ms"]["ours"] for row in rows), strict=True)
    axis.plot(x, middle, color="#c2410c", marker="o", markersize=4, linewidth=1.8, label="qlora_native, paged=True")
    axis.fill_between(x, low, high, color="#c2410c", alpha=0.15, linewidth=0)
    for name, label, color in LEVELS:
        if name in rows[0]["ms"]:
            axis.axhline(rows[0]["ms"][name][1], color=color, linewidth=1.2, linestyle=":", label=label)
    axis.set(yscale="log", xlabel="% of the states out of memory", ylabel="ms a step, median and quartiles (log scale)")
    axis.set_title(f"AdamW, {rows[0]['parameters']:,} parameters, 32-bit states", fontsize=10)
    axis.set_xticks(x)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    machine, disk = result["machine"], result["ceilings"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['threads']} threads; disk reads {disk['disk_read_gb_per_s']:g}, "
        f"writes {disk['disk_write_gb_per_s']:g} GB/s; torch {machine['torch']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=130, metadata=source(result))


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json", help="what bench_paged.py wrote")
    parser.add_argument("png", help="the picture")
    arguments = parser.parse_args()
    draw(json.loads(Path(arguments.json).read_text(encoding="utf-8")), arguments.png)


if __name__ == "__main__":
    main()
