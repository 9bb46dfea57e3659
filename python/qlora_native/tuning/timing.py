"""Times of functions called in turn, their quartiles and paired ratios: what `qlora bench` and bench/ measure with."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

Functions = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def ratios(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of a / b round by round; where one was timed in the first rounds only, over those."""
    return quartiles([x / y for x, y in zip(a, b, strict=False)])


def rounded(values: Iterable[float], factor: float = 1.0) -> list[float]:
    """For JSON: four significant digits."""
    return [float(f"{factor * value:.4g}") for value in values]


def interleaved(functions: Functions, repeats: int, warmup: int = 2) -> Seconds:
    """Seconds of each function, called in turn, so that the machine's moods fall on all of them alike.

    The order changes with every round: what ran before decides what the caches hold.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: Seconds = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(repeats):
        for name, function in order.sample(list(functions.items()), len(functions)):
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over the truth's."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def cpu_name() -> str:
    """The model name that the kernel tells, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def cache_bytes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """The size of the last-level cache as the kernel tells it; 32 MiB if it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for file in Path(root).glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)
