"""Draw the pictures of README.md and docs/ from bench/results/. Needs matplotlib.

python bench/plots.py            # all
python bench/plots.py linear     # docs/linear.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shipping_page
from pages import ROOT, results_of
from table_writer import Result, Results, Row, fill, only

from qlora_native.weight import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, TORCH, THEIRS = "#c2410c", "#1d4ed8", "#6b7280"
PARTS = {  # of the estimate
    "weights": ("weights", "scales", "dense"),
    "adapters, gradients, optimizer": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "logits and loss": ("loss",),
    "kernels, allocator": ("scratch", "slack"),
}
LINES = {  # of a product: name in the JSON -> label, color, line
    "ours": ("qlora_native, NF4", OURS, "-"),
    "bf16": ("torch, bf16", TORCH, "-"),
    "fp32": ("torch, fp32", TORCH, "-"),
    "ours_fp32": ("qlora_native, NF4, fp32 activations", OURS, ":"),
    "onednn_prepacked": ("oneDNN prepacked", "#0e7490", "-"),
    "bitsandbytes": ("bitsandbytes NF4, training", THEIRS, "-"),
    "bitsandbytes_inference": ("bitsandbytes NF4, inference only", THEIRS, ":"),
    "ggml_iq4_nl": ("ggml IQ4_NL, x in 8 bits", "#4d7c0f", ":"),
}
LEVELS = {  # of a step: label and color; they keep their states in memory whatever the share
    "unpaged": ("qlora_native, paged=False", OURS),
    "torch fused": ("torch fused", TORCH),
    "bitsandbytes PagedAdamW": ("bitsandbytes PagedAdamW, unpaged on a CPU", THEIRS),
    "torchao CPUOffloadOptimizer": ("torchao CPUOffloadOptimizer", "#0e7490"),
}
PEERS = {  # of training
    "plain-tuned": "transformers + PEFT\nbf16 weights",
    "fp32-tuned": "transformers + PEFT\nfp32",
    "plain": "transformers + PEFT\nbf16 weights",
    "bitsandbytes-tuned": "transformers + PEFT\n+ bitsandbytes NF4",
    "fp32": "transformers + PEFT\nfp32",
}
SIDES = {"ours": ("qlora_native", "#e8590c"), "theirs": ("peer", "#868e96")}
PANELS: dict[str, Callable[[Row, str], float]] = {
    "tokens a second (more is better)": lambda row, side: row["tokens_per_second"][side][1],
    "peak memory, MiB (less is better)": lambda row, side: row["peak_rss_mib"][side],
}
TEXT = "#7d8590"  # readable on white and on black
TEXTS = {"A": "library source", "B": "language reference", "C": "package descriptions"}  # in brief
FORMS = ("rtn-base", "rtn-original", "gptq-base", "gptq-original", "shipped")


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def places(count: int, number: int, of: int, width: float) -> list[float]:
    """Where ``count`` bars stand that are the ``number``-th of groups of so many."""
    return [at + (number - (of - 1) / 2) * width for at in range(count)]


def in_open_axes(axes: Axes) -> None:
    """Plain numbers on the y axis, a faint grid, no frame."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def memory(result: Result) -> Figure:
    """Predicted parts against the measured peak: one stacked bar a run, a mark where the peak was."""
    rows = result["rows"]
    figure = new_figure(9, 5.2, 120)
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
    return figure


def linear(result: Result) -> Figure:
    """Time against M with the floor, a panel for each N, forward; quartiles as bands."""
    rows = sorted((row for row in result["rows"] if row["direction"] == "forward"), key=lambda row: row["m"])
    shapes = sorted({(row["n"], row["k"]) for row in rows})
    figure = new_figure(5.4 * len(shapes), 4.6, 130)
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axes, (n, k) in zip(panels, shapes, strict=True):
        chosen = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        ticks = [row["m"] for row in chosen]
        axes.plot(ticks, [row["floor_ms"] for row in chosen], "--", color="black", linewidth=1, label="floor")
        for name, (label, color, style) in LINES.items():
            points = [(row["m"], *row["ms"][name]) for row in chosen if name in row["ms"]]
            if points:
                m, low, middle, high = zip(*points, strict=True)
                axes.plot(m, middle, style, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
                axes.fill_between(m, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", title=f"y = x Wᵀ, W {n} x {k}")
        axes.set(xlabel="M, rows of x (log scale)", ylabel="ms a product, median and quartiles (log scale)")
        axes.set_xticks(ticks, [str(m) for m in ticks])
        axes.minorticks_off()
        in_open_axes(axes)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(fill("{cpu}, {threads} threads, {cpu_isa}; torch {torch}", result["machine"]), fontsize=9)
    return figure


def paged(result: Result) -> Figure:
    """Time of a step against the share of states that is out of memory: medians as a line, quartiles as a band."""
    rows = sorted((row for row in result["rows"] if row["case"] == "shares"), key=lambda row: row["paged_out"])
    figure = new_figure(6.4, 4.4, 130)
    axes = figure.add_subplot()
    x = [100 * row["paged_out"] for row in rows]
    low, middle, high = zip(*(row["ms"]["ours"] for row in rows), strict=True)
    axes.plot(x, middle, color=OURS, marker="o", markersize=4, linewidth=1.8, label="qlora_native, paged=True")
    axes.fill_between(x, low, high, color=OURS, alpha=0.15, linewidth=0)
    for name, (label, color) in LEVELS.items():
        if name in rows[0]["ms"]:
            axes.axhline(rows[0]["ms"][name][1], color=color, linewidth=1.2, linestyle=":", label=label)
    axes.set(yscale="log", xlabel="% of the states out of memory", ylabel="ms a step, median and quartiles (log scale)")
    axes.set_title(f"AdamW, {rows[0]['parameters']:,} parameters, 32-bit states", fontsize=10)
    axes.set_xticks(x)
    in_open_axes(axes)
    axes.legend(frameon=False, fontsize=8)
    disk = "disk reads {disk_read_gb_per_s:g}, writes {disk_write_gb_per_s:g} GB/s"
    title = fill(f"{{cpu}}, {{threads}} threads; {disk}; torch {{torch}}", {**result["machine"], **result["ceilings"]})
    figure.suptitle(title, fontsize=8)
    return figure


def train(results: Results) -> Figure:
    """Speed and memory of a training step, a pair of bars for each CPU class and peer."""
    pairs = [
        (f"{cpu.upper().replace('_', '-')}\n{PEERS[row['peer']]}", row)
        for cpu, result in results.items()
        for row in result["rows"]
        if row["peer"] in PEERS
    ]
    figure = new_figure(9, 3.4, 160)
    for axes, (title, median) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for number, (side, (label, color)) in enumerate(SIDES.items()):
            values = [median(row, side) for _, row in pairs]
            drawn = axes.barh(places(len(pairs), number, 2, 0.38), values, 0.36, color=color, label=label)
            axes.bar_label(drawn, [f"{value:,.0f}" for value in values], padding=3, color=TEXT, fontsize=10)
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
    return figure


def quality(result: Result) -> Figure:
    """Nats above 16 bits: as quantized, with standard errors; and after fine-tuning, of which there are none."""
    figure = new_figure(9, 3.7, 120)
    parts = [
        ("as quantized, with standard errors", "method", "excess"),
        ("after LoRA, mean of the runs", "lora", "gap"),
    ]
    for axes, (title, kind, key) in zip(figure.subplots(1, 2), parts, strict=True):
        rows = [row for row in only(kind=kind)(result) if row["base"] in METHODS]
        texts = list(rows[0]["texts"]) if rows else []
        for number, text in enumerate(texts):
            values = [row["texts"][text][key] for row in rows]
            heights, errors = zip(*values, strict=True) if key == "excess" else (values, None)
            label = f"{text}: {TEXTS[text]}" if text in TEXTS else text
            width = 0.8 / len(texts)
            where = places(len(rows), number, len(texts), width)
            axes.bar(where, heights, width, yerr=errors, label=label, capsize=2)
        axes.set_xticks(range(len(rows)), [row["base"] for row in rows])
        axes.set(title=title, xlabel="method of quantizing", ylabel="nats a token above the 16-bit base")
        if texts:
            options = {"frameon": False, "fontsize": "small", "columnspacing": 1, "handlelength": 1}
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(texts), **options)
    return figure


def shipping(result: Result) -> Figure:
    """Retention of the 4-bit forms with standard errors, a panel for each setting."""
    settings = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    figure = new_figure(9, 3.9, 120)
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        rows = {row["form"]: row for row in only(setting=setting)(result)}
        texts = list(rows["plain"]["texts"])
        height = 0.8 / len(texts)
        for number, text in enumerate(texts):
            values, errors = zip(*(rows[form]["texts"][text]["retention"] for form in FORMS), strict=True)
            where = places(len(FORMS), number, len(texts), height)
            axes.barh(where, values, height, xerr=errors, label=shipping_page.TEXTS[text], capsize=2)
        axes.axvline(1, color="black", linewidth=0.6)
        axes.set_yticks(range(len(FORMS)), [shipping_page.NAMES[form].replace("`", "") for form in FORMS])
        axes.set_title(f"{setting} run, peak rate {result['training']['rates'][setting]:g}")
        axes.set_xlabel("retention (1: all that the adapter learned)")
    figure.axes[0].invert_yaxis()
    figure.axes[0].set_ylabel("form that ships")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize="small")
    return figure


PICTURES: dict[str, tuple[str, Callable[[Any], Figure]]] = {  # name -> its results, of all classes or of one
    "memory": ("estimate-amx", memory),
    "linear": ("linear-avx512_bf16", linear),
    "paged": ("paged-avx512_bf16", paged),
    "train": ("train", train),
    "quality": ("quality-amx", quality),
    "shipping": ("shipping-avx512_bf16", shipping),
}


def results_for(name: str) -> Any:
    """What a picture is drawn from."""
    topic, _, cpu = PICTURES[name][0].partition("-")
    return results_of(topic)[cpu] if cpu else results_of(topic)


def source(results: Any) -> str:
    """SHA-256 of the results of a picture, for its metadata: a test sees when it is out of date."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def save(name: str, path: Path) -> None:
    """Draw a picture."""
    results = results_for(name)
    metadata = {"Source": source(results), "Software": None}
    PICTURES[name][1](results).savefig(path, transparent=name == "train", metadata=metadata)


def main() -> None:
    """Draw those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    for name in parser.parse_args().names or PICTURES:
        save(name, ROOT / f"docs/{name}.png")


if __name__ == "__main__":
    main()
