"""A comparison as a Markdown table, and as a folder with a page, a picture and the figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_native._io import atomic_file, shorten, write_whole
from qlora_native.tool.evaluate.comparison import Comparison, VariantResult
from qlora_native.tool.evaluate.variants import BASELINE, REFERENCE, SHIPPED

COLUMNS = (
    *("", "loss", "perplexity", "less base", "exact"),
    *("above 16-bit", "KL to 16-bit", "same first token", "gap closed", "retention"),
)
MEANING = """Loss is the mean cross-entropy in nats a token, perplexity its exponential. "Less base" is the loss with
the adapter less that without it on the same rows; "exact" counts the rows whose answer greedy generation gives token
for token. "Above 16-bit" is the loss less that of the 16-bit model on the same rows; KL is the divergence of the
distribution of the next token from the 16-bit model's, in nats; "same first token" is how often both name the same most
likely token; "gap closed" is the share of plain rounding's (`rtn`) distance from 16 bits that is gone. Behind ± stands
the standard error over rows, of the paired difference where two models are compared; it does not cover other texts,
seeds or models."""
SHIPS = """Retention is (L_base - L_shipped) / (L_base - L_adapter): the part of what the adapter gained over the 4-bit
base that the model without an adapter keeps."""


def tables(comparison: Comparison) -> list[str]:
    """Markdown: one table a text and one a task."""
    lines: list[str] = []
    first = comparison.variants[0]
    for text, scores in first.texts.items():
        body = [_cells(comparison, variant, text) for variant in comparison.variants]
        columns = [column for column in zip(COLUMNS, *body, strict=True) if any(column[1:])]
        table = _table(*zip(*columns, strict=True))
        lines += [f"**{text}**, {int(scores.tokens.sum()):,} tokens predicted", "", *table, ""]
        lines += [_verdict(comparison, text), ""] if comparison.adapted is not None else []
    for task, metrics in first.tasks.items():
        body = [
            [variant.label, *(f"{variant.tasks[task].get(key, math.nan):.4g}" for key in metrics)]
            for variant in comparison.variants
        ]
        lines += [f"**{task}** (lm-eval)", "", *_table(["", *metrics], *body), ""]
    if legend := _legend(comparison):
        lines += [legend, ""]
    for number, about in enumerate(comparison.answers, 1):
        lines.append(f"{number}. {about['text']}")
        parts = ("question", "expected", "base", "tuned")
        lines += [
            f"   - {part}: {shorten(' '.join(about[part].split()))}" for part in parts if part in about
        ] + [""]
    return lines[:-1]


def _legend(comparison: Comparison) -> str:
    """What the rows' names mean, in a sentence."""
    parts = [f"{comparison.reference.label}: the model before 4 bits"] if comparison.reference else []
    if comparison.adapted is not None:
        base, tuned = comparison.adapted
        parts += [
            f"{base.label}: the weights that the adapter was trained on",
            f"{tuned.label}: the same with it",
        ]
    if comparison.named(SHIPPED):
        parts.append(f"{SHIPPED}: the model that the adapter was merged into")
    if any("4-bit by rtn" in variant.label for variant in comparison.variants):
        parts.append("rtn: rounded to nearest")
    return f"Rows: {'; '.join(parts)}." if parts else ""


def _verdict(comparison: Comparison, text: str) -> str:
    """Whether the adapter is better on a text, in a sentence."""
    assert comparison.adapted is not None
    base, tuned = (comparison.text_row(variant, text) for variant in comparison.adapted)
    word = {True: "Better", False: "Worse", None: "No clear difference"}[comparison.is_better(text)]
    losses = f"loss {base['loss']:.4f} -> {tuned['loss']:.4f}"
    return f"{word} with the adapter: {losses}, a change of {_figure(tuned, 'change')} nats a token."


def write_report(comparison: Comparison, folder: Path, about: Sequence[str]) -> bool:
    """Write ``report.md``, ``report.json`` and ``report.png`` into ``folder``; False if the last needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(comparison.as_dict(), indent=1) + "\n")
    drawn = bool(comparison.variants[0].texts) and plot(comparison, folder / "report.png")
    page = [
        f"# {Path(comparison.model).name}",
        "",
        *(f"- {line}" for line in about),
        "",
        *tables(comparison),
    ]
    if drawn:
        page += ["", "![Loss of each variant](report.png)"]
    page += ["", MEANING, *([SHIPS] if comparison.named(SHIPPED) else [])]
    write_whole(folder / "report.md", "\n".join([*page, ""]))
    return drawn or not comparison.variants[0].texts


def plot(comparison: Comparison, path: Path) -> bool:
    """Bars of the loss, or of the loss above 16 bits where there is a reference, which is the bar at 0; False without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    key, label = (
        ("excess", "nats a token above 16-bit") if comparison.reference else ("loss", "nats a token")
    )
    variants = comparison.variants
    texts = list(variants[0].texts)
    figure = Figure(figsize=(1.5 + 1.4 * max(2, len(variants)), 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(texts)
    for number, text in enumerate(texts):
        rows = [comparison.text_row(variant, text) for variant in variants]
        places = np.arange(len(variants)) + (number - (len(texts) - 1) / 2) * width
        heights, errors = ([row[name] or 0.0 for row in rows] for name in (key, f"{key}_error"))
        name = f"{text}, {rows[0]['loss']:.3f} in 16 bits" if comparison.reference else text
        axes.bar(places, heights, width, yerr=errors, label=name, capsize=2)
    axes.set_title(Path(comparison.model).name)
    labels = [variant.label.replace(", ", ",\n").replace(" + ", "\n+ ") for variant in variants]
    axes.set_xticks(range(len(variants)), labels)
    axes.set_ylabel(label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.legend(frameon=False, fontsize="small")
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return True


def _cells(comparison: Comparison, variant: VariantResult, text: str) -> list[str]:
    row = comparison.text_row(variant, text)
    if variant.name in (REFERENCE, BASELINE):
        row["closed"] = None
    if variant.name == REFERENCE:
        row["excess"] = None
    exact = row["exact"]
    rows = len(variant.texts[text].tokens)
    return [
        *(variant.label, _figure(row, "loss"), f"{row['perplexity']:,.2f}", _figure(row, "change")),
        "" if exact is None else f"{round(exact * rows):,} of {rows:,}",
        *(_figure(row, "excess"), _figure(row, "kl"), _figure(row, "same_first", 100)),
        *(_figure(row, "closed", 100), _figure(row, "retention")),
    ]


def _figure(row: dict[str, float | None], key: str, scale: int = 1) -> str:
    """The value ± its error, with a ``scale`` of 100 as a percentage."""
    value = row.get(key)
    if value is None:
        return ""
    error = row[f"{key}_error"]
    digits, unit = (4, "") if scale == 1 else (1, " %")
    numbers = (value,) if error is None or math.isnan(error) else (value, error)
    return " ± ".join(f"{scale * number:.{digits}f}" for number in numbers) + unit


def _table(*rows: Sequence[str]) -> list[str]:
    """Markdown of a head and other rows, whose columns are aligned in plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    return [head, re.sub("[^|]", "-", head), *body]
