"""The memory that calibrated loading takes beyond the plain one: a layer in 16 bits, its statistics, work on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_load_memory import measure, write_model

HIDDEN, INNER, LAYERS, VOCAB = 768, 3072, 4, 4096
ROWS, LENGTH, THREADS = 16, 128, 2


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["wmse", "gptq"])
def test_peak_is_the_plain_one_and_a_layer(tmp_path: Path, method: str) -> None:
    _, largest = write_model(tmp_path, HIDDEN, INNER, LAYERS, VOCAB)
    ids = f"torch.arange({ROWS * LENGTH}).view({ROWS}, {LENGTH})"
    peak, rest, num_bytes, _ = measure(tmp_path, f"load_model(sys.argv[1], method={method!r}, calibration={ids})")
    print(f"{method}: peak {peak:,}, at rest {rest:,}; model {num_bytes:,}, largest {largest:,}")
