"""Tokens a second and peak memory of a training step against its peers, as the picture of README.md.

python bench/plot_train.py docs/train.png      # needs matplotlib; reads bench/results/train-CPU_CLASS.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import results_of, source

SIDES = (("ours", "qlora_native", "#e8590c"), ("theirs", "peer", "#868e96"))
PEERS = {
    "plain-tuned": "transformers + PEFT\nbf16 weights",
    "fp32-tuned": "transformers + PEFT\nfp32",
    "plain": "transformers + PEFT\nbf16 weights",
    "bitsandbytes-tuned": "transformers + PEFT\n+ bitsandbytes NF4",
    "fp32": "transformers + PEFT\nfp32",
}
TEXT = "#7d8590"  # readable on white and on black
PANELS = (
    ("tokens a second (more is better)", "tokens_per_second"),
    ("peak memory, MiB (less is better)", "peak_rss_mib"),
)


def bars_of(results: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Label and row of each pair of bars."""
    return [
        (f"{cpu.upper().replace('_', '-')}\n{PEERS[row['peer']]}", row)
        for cpu, result in results.items()
        for row in result["rows"]
        if row["peer"] in PEERS
    ]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One panel a measure, transparent, with a pair of bars for each CPU class and peer."""
    from matplotlib.figure import Figure

    pairs = bars_of(results)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
        for number, (side, label, color) in enumerate(SIDES):
            values = [row[key][side] for _, row in pairs]
            medians = [value[1] if isinstance(value, list) else value for value in values]
            places = [place + 0.38 * (number - 0.5) for place in range(len(pairs))]
            drawn = axes.barh(places, medians, 0.36, color=color, label=label)
            axes.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=3, color=TEXT, fontsize=10)
        axes.set_xlabel(title, color=TEXT, fontsize=11)
        axes.set_yticks(range(len(pairs)), [label for label, _ in pairs], color=TEXT, fontsize=9)
        axes.set_xticks([])
        axes.margins(x=0.16)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    figure.axes[0].set_ylabel("CPU class and peer", color=TEXT, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, labelcolor=TEXT, fontsize=10)
    figure.savefig(path, dpi=160, transparent=True, metadata=source(results))


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("png", type=Path)
    draw(results_of("train"), parser.parse_args().png)


if __name__ == "__main__":
    main()
