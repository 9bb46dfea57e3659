"""What the benches share: interleaved timing, quartiles, paired ratios, bars, the machine, JSON."""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

import qlora_native as qn

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


def interleaved_sparing(
    functions: Functions, repeats: int, keep: Iterable[str] = ("ours",), slow: float = 0.02, few: int = 3
) -> Seconds:
    """As :func:`interleaved`; but what takes more than ``slow`` seconds and is not to be kept runs in the first few
    rounds only."""
    once = interleaved(functions, 1, warmup=1)
    spared = {name for name, seconds in once.items() if seconds[0] > slow} - set(keep)
    first = interleaved(functions, min(few, repeats), warmup=0)
    kept = {name: function for name, function in functions.items() if name not in spared}
    rest = interleaved(kept, max(0, repeats - few), warmup=0)
    return {name: seconds + rest.get(name, []) for name, seconds in first.items()}


class Bar(NamedTuple):
    """What a row must hold: at most `limit` times the rival's time, or, if `faster`, at least `limit` times as fast."""

    rival: str
    limit: float
    faster: bool = False


def verdicts(seconds: Seconds, bars: Iterable[Bar], ours: str = "ours") -> list[dict[str, Any]]:
    """Each bar with the measured median and whether it is met; None for both where the rival was not there."""
    found = []
    for bar in bars:
        value = met = None
        if bar.rival in seconds:
            pair = seconds[ours], seconds[bar.rival]
            value = ratios(*reversed(pair))[1] if bar.faster else ratios(*pair)[1]
            met = value >= bar.limit if bar.faster else value <= bar.limit
            value = rounded([value])[0]
        measure = "times as fast" if bar.faster else "of the time"
        found.append({"rival": bar.rival, "measure": measure, "bar": bar.limit, "value": value, "met": met})
    return found


def timings(seconds: Seconds, bars: Iterable[Bar] = (), floor: float | None = None) -> dict[str, Any]:
    """The part of a row that every bench has: ms, ratios, the floor (given in seconds), bars."""
    row: dict[str, Any] = {"ms": {name: rounded(quartiles(values), 1e3) for name, values in seconds.items()}}
    ours = seconds["ours"]
    row["ours_over"] = {name: rounded(ratios(ours, values)) for name, values in seconds.items() if name != "ours"}
    if floor is not None:
        row |= {"floor_ms": rounded([floor], 1e3)[0], "of_floor": rounded([floor / median(ours)])[0]}
    row["bars"] = verdicts(seconds, bars)
    return row


def line(row: dict[str, Any], *keys: str) -> str:
    """A row in words for the terminal."""
    words = [str(row[key]) for key in keys if key in row]
    words.append(" ".join(f"{name} {values[1]:g}" for name, values in row.get("ms", {}).items()) + " ms")
    if "of_floor" in row:
        words.append(f"floor {row['floor_ms']:g} ms, {100 * row['of_floor']:.0f} % of it reached")
    for bar in row["bars"]:
        state = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        words.append(f"[{bar['value']} {bar['measure']} of {bar['rival']}, bar {bar['bar']}: {state}]")
    if not row["match"]:
        words.append("NO MATCH")
    return "  ".join(words)


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


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cache_mib": cache_bytes() >> 20,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        **{key: value for key, value in qn.build_info().items() if key in ("version", "cpu_isa", "compiler")},
    }


def write_json(path: str | None, result: dict[str, Any]) -> None:
    """Writes a result, if a path was given. The innermost lists stay on one line."""
    if path:
        text = json.dumps(result, indent=1)
        Path(path).write_text(_short_lists(text) + "\n", encoding="utf-8")


def _short_lists(text: str) -> str:
    parts = text.split("[")
    for index, part in enumerate(parts):
        inside, closed, rest = part.partition("]")
        if index and closed and "{" not in inside:
            parts[index] = " ".join(inside.split()) + closed + rest
    return "[".join(parts)
