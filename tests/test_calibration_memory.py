"""The memory of calibrated loading beyond plain loading: a layer in 16 bits, its statistics, work on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_load_memory import measure, write_model

HIDDEN, INNER, LAYERS, VOCAB = 768, 2304, 2, 4096
ROWS, LENGTH, THREADS = 16, 128, 2


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
@pytest.mark.parametrize("method", ["wmse", "gptq"])
def test_peak_is_the_plain_one_and_a_layer(tmp_path: Path, method: str) -> None:
    _, largest = write_model(tmp_path, HIDDEN, INNER, LAYERS, VOCAB)
    ids = f"torch.arange({ROWS * LENGTH}).view({ROWS}, {LENGTH})"
    peak, _, num_bytes, _ = measure(tmp_path, f"load_model(sys.argv[1], method={method!r}, calibration={ids})")
    plain = (num_bytes + largest) * 1.1
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    hidden = 2 * ROWS * LENGTH * HIDDEN
    statistics, factors = 0, 0
    if method == "gptq":
        statistics = 4 * (3 * HIDDEN**2 + INNER**2)
        factors = 10 * INNER**2  # one at a time: in fp64, and as the loop over columns reads it
    # A sequence in flight, parts of a weight in fp32, and what the heap of each thread keeps.
    work = THREADS * (24 if method == "gptq" else 12) * 2**20
    figures = f"{method}: peak {peak:,} bytes; plain {plain:,.0f}, layer {layer:,}, statistics {statistics:,}"
    print(figures)
    assert peak <= plain + layer + hidden + statistics + factors + work, figures
