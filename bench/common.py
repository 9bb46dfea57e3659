"""What the benches share: their command line, their results and where these come from, bars, and parts that are kept.

The timing itself is that of qlora_native.tool.cli.bench.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
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
    rounded,
)
from qlora_native.tool.cli.bench import relative_error as relative_error

# ---- a bench's command line and its result


class Bench:
    """The command line of a bench, and its result, to which rows are added and which is written at the end.

    Args:
        options: name -> default, beside ``--json`` and ``--threads``. Of several words or numbers one or more may be
            chosen, words only of these; False is a switch, a type that of a positional argument, a dict what argparse
            takes.
    """

    def __init__(self, name: str, about: str | None, **options: Any) -> None:
        birth()
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        stored = "file for the result; without a name bench/results/BENCH-CPU_CLASS.json"
        parser.add_argument("--json", nargs="?", const="", help=stored)
        for option, default in {"threads": os.cpu_count() or 1, **options}.items():
            flag = f"--{option.replace('_', '-')}"
            if isinstance(default, dict):
                parser.add_argument(flag, **default)
            elif isinstance(default, type):
                parser.add_argument(option, type=default)
            elif default is False:
                parser.add_argument(flag, action="store_true")
            elif isinstance(default, tuple):
                kind = type(default[0])
                choices = default if kind is str else None
                parser.add_argument(flag, type=kind, nargs="+", choices=choices, default=default)
            else:
                parser.add_argument(flag, type=type(default), default=default)
        self.options = parser.parse_args()
        torch.set_num_threads(self.options.threads)
        torch.manual_seed(0)
        self.result: dict[str, Any] = {"bench": name, "machine": machine()}

    def begin(self, **head: Any) -> None:
        """Print what the rows come after: the machine, and what else the result has."""
        self.result |= head | {"rows": []}
        print(json.dumps(self.result), flush=True)

    def add(self, row: dict[str, Any], *keys: str) -> None:
        """Put a row into the result, and print it with these of its values."""
        self.result["rows"].append(row)
        print(line(row, *keys), flush=True)

    def write(self, name: str | None = None, key: Sequence[str] = ()) -> None:
        """Write the result where ``--json`` says. With a key, rows of the stored one that have others stay."""
        if key:
            keep_other_rows(self.options.json, self.result, key)
        write_json(self.options.json, self.result, name)


def line(row: dict[str, Any], *keys: str) -> str:
    """A row in words for the terminal."""
    words = [str(row[key]) for key in keys if key in row]
    if "ms" in row:
        words.append(" ".join(f"{name} {values[1]:g}" for name, values in row["ms"].items()) + " ms")
    if "of_floor" in row:
        words.append(f"floor {row['floor_ms']:g} ms, {100 * row['of_floor']:.0f} % of it reached")
    for bar in row.get("bars", ()):
        state = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        words.append(f"[{bar['value']} {bar['measure']} of {bar['rival']}, bar {bar['bar']}: {state}]")
    if row.get("match") is False:
        words.append("NO MATCH")
    return "  ".join(words)


# ---- timing and bars


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


def verdict(rival: str, measure: str, limit: float, value: float, at_least: bool = False) -> dict[str, Any]:
    """A bar on a figure that is no time."""
    met = value >= limit if at_least else value <= limit
    value = rounded([value])[0]
    return {"rival": rival, "measure": measure, "bar": limit, "at_least": at_least, "value": value, "met": bool(met)}


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


def tokens_a_second(seconds: Seconds, *tokens: float) -> dict[str, list[float]]:
    """Quartiles of each side, of as many tokens in every round or of those of each round."""
    counts = tokens * (1 if len(tokens) > 1 else max(map(len, seconds.values())))
    return {
        name: rounded(quartiles([count / s for count, s in zip(counts, values, strict=False)]))
        for name, values in seconds.items()
    }


# ---- where a result comes from


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
    differs from the commit. The first call of a process counts, which is :class:`Bench`'s: code that changes during
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


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file has, which is made first where it is not there: a run that was stopped goes on."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".partial")
        unfinished.write_text(json.dumps(make()) + "\n", encoding="utf-8")
        unfinished.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def birth_in(work: Path) -> dict[str, Any]:
    """The birth of what a folder keeps from run to run: that of its first part, ``until`` that of its last one.

    Raises:
        SystemExit: the parts would be of different versions of torch or of a peer, or nobody knows of which.
    """
    file = work / "birth.json"
    if not file.exists() and work.exists() and any(work.iterdir()):
        raise SystemExit(f"{work} has parts of an unknown commit: name another folder, or empty it.")
    first: dict[str, Any] = kept(file, birth)
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
