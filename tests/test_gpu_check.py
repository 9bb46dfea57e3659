"""The check for machines with a GPU, as far as one without can run it; its golden words against plain arithmetic."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gpu_primitives
import gpu_products
import gpu_timing
import pytest
import torch
from laws import ROOT
from sentences import Check

GOLDEN = ROOT / "tests" / "golden" / "cuda_primitives.txt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu_check.sh measures on it")
def test_a_dry_run_measures_every_kind_of_row(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert found["dry_run"] and found["failed"] == [] and "dry run" in found["card"]["name"]
    ops = {row["op"] for row in found["rows"]}
    passes = {"dequantize_4bit", "quantize_4bit", "adamw_step", "paged_adamw_step"}
    assert ops == {*gpu_products.DIRECTIONS, *passes, "qlora_step", "load"}
    assert all(row["match"] for row in found["rows"])
    assert "each op ran once" in (tmp_path / "gpu_check.log").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "bench/gpu_check.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "torch finds no GPU; --dry-run" in done.stderr


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    measured = {"copy_gb_per_s": 1000.0, "bf16_tflop_per_s": 100.0}
    assert gpu_timing.floor(measured, 1e9) == pytest.approx(1e-3)
    assert gpu_timing.floor(measured, 1e9, 1e12) == pytest.approx(1e-2)


def test_a_primitive_that_differs_is_named(sentence: Check) -> None:
    golden = {"mma": ["00000000"] * 128, "bf16": ["1"] * 32}
    assert gpu_primitives.differences(golden, golden) == []
    other = {"mma": [*golden["mma"][:70], "00000001", *golden["mma"][71:]]}
    sentence("\n".join(gpu_primitives.differences(golden, other)))


# ---------------------------------------------------------------------------------------------------------------------
# The golden words, which the emulator wrote, are those of plain arithmetic


def words(name: str) -> list[list[int]]:
    """By lane."""
    flat = [int(word, 16) for word in gpu_primitives.read(str(GOLDEN))[name]]
    return [flat[i : i + len(flat) // 32] for i in range(0, len(flat), len(flat) // 32)]


def as_float(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


@pytest.mark.parametrize("name", ["mma_m16n8k16_bf16", "mma_m16n8k16_fp16", "mma_m16n8k8_fp16"])
def test_golden_products(name: str) -> None:
    """Row and column of a lane's four sums as the PTX manual tabulates them, section 9.7.14.5."""
    depth, times = (8, 1) if "k8" in name else (16, 2)
    a = torch.tensor([[(3 * m + 5 * k) % 17 - 8 for k in range(depth)] for m in range(16)])
    b = torch.tensor([[(7 * k + 11 * n) % 13 - 6 for n in range(8)] for k in range(depth)])
    product = times * (a @ b)
    for lane, got in enumerate(words(name)):
        for i, word in enumerate(got):
            row, column = lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
            start = 8 * row + column if depth == 16 else i + 1
            assert as_float(word) == start + int(product[row, column]), (lane, i)


@pytest.mark.parametrize("trans", [False, True])
def test_golden_ldmatrix(trans: bool) -> None:
    """Element (row, column) of matrix i is 64 i + 8 row + column."""
    for lane, got in enumerate(words("ldmatrix_trans" if trans else "ldmatrix")):
        for matrix, word in enumerate(got):
            g, t = lane // 4, lane % 4
            pair = [(2 * t + j, g) if trans else (g, 2 * t + j) for j in range(2)]
            low, high = (64 * matrix + 8 * row + column for row, column in pair)
            assert word == low | high << 16, (lane, matrix)


def test_golden_rounding() -> None:
    """Against torch's conversions; the inputs are those of the row `cp_async` copies."""
    inputs = [lane[:4] for lane in words("cp_async")]  # lane l holds the words of lane l + 1
    inputs = [inputs[-1], *inputs[:-1]]
    for lane, got in zip(inputs, words("rounding"), strict=True):
        values = torch.tensor([struct.unpack("<i", struct.pack("<I", w))[0] for w in lane], dtype=torch.int32)
        for first, dtype in ((0, torch.bfloat16), (2, torch.float16)):
            halves = values.view(torch.float32).to(dtype).view(torch.int16).tolist()
            packed = [(halves[2 * i] & 0xFFFF) | (halves[2 * i + 1] & 0xFFFF) << 16 for i in range(2)]
            assert got[first : first + 2] == packed
        for first, dtype in ((4, torch.float16), (8, torch.bfloat16)):
            back = values.view(torch.float32).to(dtype).float().view(torch.int32).tolist()
            assert got[first : first + 4] == [word & 0xFFFFFFFF for word in back]
