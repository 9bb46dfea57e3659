"""What became of a file's rows, for people and for programs: lengths, what was cut or dropped, single rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.formats import normalize
from qlora_native.data.readers import SourceRow
from qlora_native.data.template import IGNORE_INDEX, ChatEncoder

BINS = 12
LINES_NAMED = 10  # of the rows that were cut or dropped


def summary(rows: TokenizedDataset) -> dict[str, Any]:
    """The numbers of a file: its stats, lengths, and the lines of the rows that were cut or dropped (the first few)."""
    lengths = rows.lengths
    return {
        **rows.stats.as_dict(),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "histogram": histogram(lengths),
        "truncated_lines": rows.lines[rows.truncated][:LINES_NAMED].tolist(),
        "dropped_too_long_lines": rows.dropped.lines[rows.dropped.too_long][:LINES_NAMED].tolist(),
        "dropped_untrained_lines": rows.dropped.lines[~rows.dropped.too_long][:LINES_NAMED].tolist(),
    }


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) of up to twelve ranges of equal width that cover ``lengths``, int64 [rows]."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width)
    return [(low + at * width, low + (at + 1) * width - 1, int(count)) for at, count in enumerate(counts)]


def plot_lengths(lengths: np.ndarray, max_length: int, picture: Path) -> None:
    """Draw the lengths, int64 [rows], into a PNG. ImportError without matplotlib, OSError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="rows")
    axes.hist(lengths, bins=50)
    axes.axvline(max_length, color="black", linestyle="--", label=f"max_length {max_length:,}")
    axes.legend()
    figure.savefig(picture, dpi=120)


def render(encoder: ChatEncoder, source: SourceRow, format: str) -> dict[str, Any]:
    """One row: its line, its tokens, those trained, those cut off, why it is dropped if it is, and its text in parts
    that are trained or not."""
    encoded = encoder.encode(normalize(source, format))
    dropped = None
    if not encoded.trained:
        dropped = f"no trained token within max_length={encoder.max_length}" if encoded.cut else "nothing to train on"
    return {
        "line": source.line,
        "tokens": len(encoded.input_ids),
        "trained": encoded.trained,
        "cut": encoded.cut,
        "dropped": dropped,
        "parts": _parts(encoder.tokenizer, encoded.input_ids, encoded.labels),
    }


def _parts(tokenizer: Any, ids: list[int], labels: list[int]) -> list[dict[str, Any]]:
    """The text of each run of tokens that are trained or are not."""
    parts: list[dict[str, Any]] = []
    done = ""
    for at in range(len(ids)):
        trained = labels[at] != IGNORE_INDEX
        if at + 1 < len(ids) and (labels[at + 1] != IGNORE_INDEX) == trained:
            continue
        # Decoded from the start: a tokenizer may drop the space before the first token that it is given.
        text = tokenizer.decode(ids[: at + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append({"text": text[len(done) :], "trained": trained})
        done = text
    return parts
