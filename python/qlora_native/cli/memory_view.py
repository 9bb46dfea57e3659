"""An estimate as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_native.cli.estimate import WHAT, is_plain, size
from qlora_native.errors import UserError

if TYPE_CHECKING:
    from qlora_native.estimate import Estimate, Estimator


def show(estimate: Estimate, title: str, lines: Sequence[str]) -> None:
    """Print the parts of the peak, largest moment; a table on a terminal, plain lines elsewhere."""
    peak = estimate.peak
    rows = [(WHAT[field.name], getattr(peak, field.name)) for field in fields(peak)]
    if is_plain() or not _rich_table(title, rows, peak.total):
        print(title)
        for name, num_bytes in [*rows, ("total", peak.total)]:
            print(f"  {name:<20} {size(num_bytes):>12}")
    for line in lines:
        print(line)


def _rich_table(title: str, rows: Sequence[tuple[str, int]], total: int) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("", footer="total")
    table.add_column("memory", footer=size(total), justify="right")
    table.add_column("")
    most = max(num_bytes for _, num_bytes in rows) or 1
    for name, num_bytes in rows:
        table.add_row(name, size(num_bytes), "\u2588" * round(30 * num_bytes / most))
    Console().print(table)
    return True


def plot(estimator: Estimator, picture: Path, name: str) -> None:
    """Stacked bars of the peak for four lengths, checkpointing on and off, into a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install 'qlora_native[train]'") from None
    if picture.suffix != ".png":
        raise UserError(f"--plot is {picture}: expected a name that ends in .png")
    length = estimator.setting.length
    cells = [(n, on) for n in (max(64, length // 4), max(64, length // 2), length, 2 * length) for on in (True, False)]
    estimates = [estimator.at(length=n, checkpointing=on) for n, on in cells]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="GiB", title=f"{name}, batch of {estimator.setting.batch_size}")
    bottoms = [0.0] * len(cells)
    for field, what in WHAT.items():
        heights = [getattr(estimate.peak, field) / 2**30 for estimate in estimates]
        axes.bar(range(len(cells)), heights, bottom=bottoms, label=what)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(cells)), [f"{n:,}\n{'ckpt' if on else 'all kept'}" for n, on in cells], fontsize=8)
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(axis="y", alpha=0.3)
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise UserError(f"could not write {picture}: {error.strerror}") from error
