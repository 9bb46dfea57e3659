"""What the benches share: interleaved timing, quartiles, the machine, JSON."""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import qlora_native as qn


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, so that the machine's moods fall on all of them alike.

    The order changes with every round: what ran before decides what the caches hold.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(repeats):
        for name, function in order.sample(list(functions.items()), len(functions)):
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def cpu_name() -> str:
    """The model name that the kernel tells, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        **{key: value for key, value in qn.build_info().items() if key in ("version", "cpu_isa", "compiler")},
    }


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Writes a result, if a path was given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def ceilings(repeats: int = 15) -> dict[str, float]:
    """What this machine can do now: GB/s of a large copy (read + write), GFLOP/s of torch's bf16 and fp32 GEMM."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    found = {}
    copies = interleaved({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    found["copy_gb_per_s"] = 2 * source.numel() / median(copies) / 1e9
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        a = torch.randn(1024, 2048).to(dtype)
        b = torch.randn(2048, 2048).to(dtype)
        out = torch.empty(1024, 2048, dtype=dtype)
        seconds = median(interleaved({"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, repeats)["mm"])  # type: ignore[misc]
        found[f"{name}_gemm_gflop_per_s"] = 2 * 1024 * 2048 * 2048 / seconds / 1e9
    return found
