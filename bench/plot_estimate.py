"""Predicted parts against the measured peak, as a picture. Needs matplotlib.

python bench/plot_estimate.py bench/results/estimate-amx.json docs/memory.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import source

PARTS = {
    "weights": ("weights", "scales", "dense"),
    "adapters, gradients, optimizer": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "logits and loss": ("loss",),
    "kernels, allocator": ("scratch", "slack"),
}


def draw(result: dict[str, Any], path: str) -> None:
    """One stacked bar a run, a mark where the measured peak was."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot(ylabel="peak memory, MiB", title="Predicted parts (bars) and measured peak (marks)")
    bottoms = [0.0] * len(rows)
    for label, names in PARTS.items():
        heights = [sum(row["terms"][name] for name in names) / 2**20 for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottoms, label=label)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    measured = [row["total"]["measured"] / 2**20 for row in rows]
    axes.plot(range(len(rows)), measured, "k_", markersize=16, markeredgewidth=2, label="measured")
    labels = [f"{row['model']}, {row['length']}, {'ckpt' if row['checkpointing'] else 'all kept'}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7, rotation=90)
    axes.set_xlabel("model, tokens a row, activations: recomputed (ckpt) or all kept")
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120, metadata=source(result))


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json", help="what bench_estimate.py wrote")
    parser.add_argument("png", help="the picture")
    arguments = parser.parse_args()
    draw(json.loads(Path(arguments.json).read_text(encoding="utf-8")), arguments.png)


if __name__ == "__main__":
    main()
