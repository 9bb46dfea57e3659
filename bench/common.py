"""What the benches share beside the timing itself (qlora_native.tool.cli.bench): bars, the machine, JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import isa_env
import torch
from pages import RESULTS, ROOT

import qlora_native as qn
from qlora_native.tool.cli.bench import (
    Functions,
    Seconds,
    cache_bytes,
    cpu_name,
    interleaved,
    quartiles,
    ratios,
    relative_error,
    rounded,
)

__all__ = [
    "Bar",
    "Functions",
    "Seconds",
    "add_json",
    "birth",
    "birth_in",
    "bitsandbytes_kernels",
    "cache_bytes",
    "cpu_name",
    "interleaved",
    "interleaved_sparing",
    "limit_bitsandbytes",
    "line",
    "machine",
    "multiplies_bf16",
    "peer_dtype",
    "quartiles",
    "ratios",
    "relative_error",
    "rounded",
    "timings",
    "verdicts",
    "write_json",
]


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
        seconds = {**seconds, "floor": [floor] * len(ours)}  # a rival to bars alone
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
    if row["match"] is False:
        words.append("NO MATCH")
    return "  ".join(words)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cache_mib": cache_bytes() >> 20,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "torch_uses": isa_env.limits(),
        **{key: value for key, value in qn.build_info().items() if key in ("version", "cpu_isa", "compiler")},
    }


# What a figure depends on beside this package: torch and what the peers are made of.
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "kernels", "torchao", "trl", "gguf", "xllamacpp")


@cache
def birth() -> dict[str, Any]:
    """Where a result comes from: the commit that is measured, when, and the versions of this package and of peers.

    Outside a clone the commit is that of the variable BENCH_COMMIT, or None; ``changed`` is true if the working tree
    differs from the commit. The first call of a process counts, which is :func:`add_json`'s: code that changes during
    the run is not what ran.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    versions = {"qlora_native": qn.build_info()["version"]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, changed = os.environ.get("BENCH_COMMIT"), None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = git("rev-parse", "HEAD")
        pages = (":!bench/results", ":!docs", ":!README.md")
        changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", *pages))
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"commit": commit, "changed": changed, "date": today, "versions": versions}


def birth_in(work: Path) -> dict[str, Any]:
    """The birth of what a folder keeps from run to run: that of its first part, ``until`` that of its last one.

    Raises:
        SystemExit: the parts would be of different versions of torch or of a peer, or nobody knows of which.
    """
    file = work / "birth.json"
    if not file.exists():
        if work.exists() and any(work.iterdir()):
            raise SystemExit(f"{work} has parts of an unknown commit: name another folder, or empty it.")
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(birth()) + "\n", encoding="utf-8")
    first: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if first["versions"] != birth()["versions"]:
        raise SystemExit(f"{work} was begun with {first['versions']}, now {birth()['versions']}: name another folder.")
    if first["commit"] == birth()["commit"]:
        return {**first, "changed": first["changed"] or birth()["changed"]}
    return {**first, "until": {key: birth()[key] for key in ("commit", "changed", "date")}}


def multiplies_bf16() -> bool:
    """Whether the CPU class in use has a dot product for bf16: torch's own bf16 products are plain loops without."""
    from qlora_native.models.fuse import attends_in_fp32  # brings transformers, which most benches do without

    return not attends_in_fp32()


def peer_dtype() -> torch.dtype:
    """In which dtype the peers are at their best here."""
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def limit_bitsandbytes() -> None:
    """bitsandbytes asks the CPU itself, whatever torch and its libraries are limited to (isa_env.py)."""
    import bitsandbytes

    if not multiplies_bf16():
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def bitsandbytes_kernels() -> bool:
    """Whether bitsandbytes multiplies by its kernels from a hub, which the package ``kernels`` fetches on import; else
    by those of its wheel. They are for inference alone, on CPUs with a dot product for bf16."""
    backend = importlib.import_module("bitsandbytes.backends.cpu.ops")
    return multiplies_bf16() and getattr(backend, "gemm_4bit_forward_kernel", None) is not None


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``, whose value is for :func:`write_json`."""
    birth()
    parser.add_argument(
        "--json", nargs="?", const="", help="file for the result; without a name bench/results/BENCH-CPU_CLASS.json"
    )


def result_file(path: str, result: dict[str, Any], name: str | None = None) -> Path:
    """Where a result is stored; "" is its file in bench/results."""
    return Path(path or RESULTS / f"{name or result['bench']}-{result['machine']['cpu_isa']}.json")


def keep_other_rows(path: str | None, result: dict[str, Any], key: Sequence[str]) -> None:
    """Rows of the stored result that this run did not measure stay in it, and the birth of the first of them.

    Raises:
        SystemExit: they were measured with other versions of torch or of a peer.
    """
    if path is None or not (file := result_file(path, result)).exists():
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    measured = {tuple(row.get(name) for name in key): row for row in result["rows"]}
    rows = {tuple(row.get(name) for name in key): row for row in stored["rows"]} | measured
    if len(rows) > len(measured):
        now = birth()
        if stored["birth"]["versions"] != now["versions"]:
            raise SystemExit(f"{file} has rows of {stored['birth']['versions']}, now {now['versions']}: measure all.")
        result["birth"] = {**stored["birth"], "until": {name: now[name] for name in ("commit", "changed", "date")}}
        result["rows"] = list(rows.values())


def write_json(path: str | None, result: dict[str, Any], name: str | None = None) -> None:
    """Writes a result; "" is its file in bench/results by its ``name``, None writes nothing. A result that has a
    birth keeps it. The innermost lists stay on one line."""
    if path is not None:
        file = result_file(path, result, name)
        born = {"birth": birth(), **result}
        if "bitsandbytes" in sys.modules:
            born["bitsandbytes_kernels"] = bitsandbytes_kernels()
        file.write_text(_short_lists(json.dumps(born, indent=1)) + "\n", encoding="utf-8")


def _short_lists(text: str) -> str:
    parts = text.split("[")
    for index, part in enumerate(parts):
        inside, closed, rest = part.partition("]")
        if index and closed and "{" not in inside:
            parts[index] = " ".join(inside.split()) + closed + rest
    return "[".join(parts)
