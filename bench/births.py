"""Where a figure comes from: the line that pages print, and the mark of a figure whose code has changed since.

A mark is information for the reader. It depends on the commit that is checked out, so ``--check`` of the page scripts
compares pages without marks; ``python bench/readme.py --marks`` lists them, and ``--write`` of each script writes them.
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = " †"
WIDTH = 116  # of a page's line, before marks
FOOTNOTE = "A † behind a CPU class: code of that bench has changed since (`python bench/readme.py --marks` lists it)."

_PACKAGE = "python/qlora_native"
_KERNELS = ("cpp/core", "cpp/cpu/isa", "cpp/cpu/kernels/kernels*", "cpp/cpu/parallel.h")
_PRODUCTS = (
    *_KERNELS,
    *(f"cpp/cpu/{name}*" for name in ("linear_4bit", "kernels/gemm", "kernels/rows", "kernels/tile")),
    *(f"{_PACKAGE}/ops/{name}.py" for name in ("linear_4bit", "_engine", "_operands", "_direct")),
)
_OPTIMIZER = (
    *_KERNELS,
    *(f"cpp/cpu/{name}*" for name in ("adamw_step", "lion_step", "gradient_norm", "kernels/optim")),
    *(f"{_PACKAGE}/{name}" for name in ("optim", "ops/_optim.py", "ops/adamw_step.py", "ops/lion_step.py")),
)
_PAGED = (*_OPTIMIZER, "cpp/cpu/files", "bench/bench_paged.py", "bench/paged_loop.py")
_ROOMS = ("ops", "nn", "lora", "weights", "models", "functional.py")
_MODEL = ("cpp/core", "cpp/cpu", *(f"{_PACKAGE}/{name}" for name in _ROOMS))
_STEP = (*_MODEL, *(f"{_PACKAGE}/{name}" for name in ("optim", "_threads.py", "_memory.py", "_buffers.py")))
_RUN = (*_STEP, f"{_PACKAGE}/tool/train", f"{_PACKAGE}/data")
_TRAIN = (*_STEP, "bench/bench_train.py", "bench/train_sides.py")
_RESIDENCY = (*_RUN, "cpp/cpu/files", f"{_PACKAGE}/tool/estimate", "bench/bench_residency.py")
_QUANTIZE = ("quantize_4bit", "dequantize_4bit", "kernels/quantize", "kernels/nearest", "kernels/scales")

# Name of the results -> what a figure of them depends on, as git's pathspecs.
PATHS: dict[str, tuple[str, ...]] = {
    "train": _TRAIN,
    "train_learn": _TRAIN,
    "real": (*_STEP, "bench/bench_real.py", "bench/train_sides.py"),
    "generate": (*_MODEL, "bench/bench_generate.py"),
    "linear": (*_PRODUCTS, f"{_PACKAGE}/functional.py", "bench/bench_linear.py", "bench/linear_contenders.py"),
    "quantize": (*_KERNELS, *(f"cpp/cpu/{name}*" for name in _QUANTIZE), "bench/bench_quantize.py"),
    "optim": (*_OPTIMIZER, "bench/bench_optim.py"),
    "gguf": (*_PRODUCTS, "cpp/cpu/kernels/gguf*", "bench/bench_gguf.py", "bench/ggml_peer.py"),
    "paged": _PAGED,
    "paged_learn": _PAGED,
    "packing": (*_RUN, "bench/bench_packing.py"),
    "switch": (*_STEP, f"{_PACKAGE}/weight.py", "bench/bench_switch.py"),
    "busy": (*_RUN, "bench/bench_busy.py"),
    "preference": (*_STEP, "bench/bench_preference.py"),
    "estimate": (*_RUN, f"{_PACKAGE}/tool/estimate", "bench/bench_estimate.py"),
    "residency": _RESIDENCY,
    "residency_70b": _RESIDENCY,
    "shipping": (*_RUN, f"{_PACKAGE}/calibration", "bench/bench_shipping.py", "bench/quality_texts.py"),
    "quality": (*_STEP, f"{_PACKAGE}/calibration", "bench/bench_quality.py", "bench/quality_texts.py"),
    "start": ("pyproject.toml", "CMakeLists.txt", "cpp", "cuda", "tests", "bench/bench_start.py"),
    "host_cost": (*(f"{_PACKAGE}/{room}" for room in _ROOMS), "bench/host_cost.py", "bench/gpu_passes.py"),
    "gpu_check": ("cpp/core", "cuda", f"{_PACKAGE}/ops", "bench/gpu_*.py"),
}

Results = Mapping[str, Mapping[str, Any]]  # CPU class -> what a bench found there


def git(*words: str) -> str | None:
    """What git prints; None where it cannot tell: no git, an sdist, a shallow clone."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def is_born(result: Mapping[str, Any]) -> bool:
    """Whether a result names its commit, its day and versions."""
    birth = result.get("birth") or {}
    return bool(re.fullmatch("[0-9a-f]{40}", str(birth.get("commit"))) and birth.get("date") and birth.get("versions"))


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """File name without its ending -> every result of a folder."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def unborn(folder: Path) -> list[str]:
    """The files of results that lack it."""
    return [f"{stem}.json" for stem, result in stored(folder).items() if not is_born(result)]


@cache
def changed_since(commit: str, paths: tuple[str, ...]) -> tuple[str, ...] | None:
    """The paths that differ between a commit and the one that is checked out; None where git cannot tell."""
    changed = git("diff", "--name-only", commit, "HEAD", "--", *paths)
    return None if changed is None else tuple(changed.split())


def last_change(name: str) -> str | None:
    """The commit that last changed what a figure depends on; None where git cannot tell."""
    return (git("log", "-1", "--format=%H", "--", *PATHS[name]) or "").strip() or None


def is_old(name: str, result: Mapping[str, Any]) -> bool:
    """Whether the code of these figures has changed since; False where git cannot tell."""
    return bool(is_born(result) and changed_since(result["birth"]["commit"], PATHS[name]))


def wrapped(text: str) -> str:
    """A sentence in lines of a page."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def text_of(results: Results) -> str:
    """When, from which commit and with which versions the results of each class are."""
    found: dict[str, list[str]] = {}
    for cpu, result in results.items():
        if not is_born(result):
            continue
        birth = result["birth"]
        verb = "Stored" if birth.get("backfilled") else "Measured"
        versions = ", ".join(f"{package} {version}" for package, version in birth["versions"].items())
        dirty = " with changes on top" if birth.get("changed") else ""
        words = f"{verb} {birth['date']}, commit {birth['commit'][:7]}{dirty}, {versions}"
        if "until" in birth:
            words += f", until {birth['until']['date']}, commit {birth['until']['commit'][:7]}"
        found.setdefault(words, []).append(cpu)
    return "\n".join(wrapped(f"{words} ({', '.join(classes)}).") for words, classes in found.items())


def commits(*groups: Results) -> str:
    """The commits and days of results, in short."""
    born = [result["birth"] for results in groups for result in results.values() if is_born(result)]
    return ", ".join(dict.fromkeys(f"{birth['commit'][:7]} of {birth['date']}" for birth in born))


def marked(name: str, text: str, results: Results) -> str:
    """Text of a page about these results, with a mark behind the name of each class whose figures are old."""
    for cpu in (cpu for cpu, result in results.items() if is_old(name, result)):
        text = re.sub(rf"(?<!\S){cpu}(?= \||[,)])|(?<=\(){cpu}(?=[,)])", cpu + MARK, text)
    return text


def without_marks(text: str) -> str:
    """A page as it is whatever commit is checked out: without the footnote too, which may depend on the marks."""
    return text.replace(f"{FOOTNOTE}\n", "").replace(MARK, "")


def report(folder: Path) -> list[str]:
    """A sentence for each file of results: which code has changed since, if git can tell."""
    found = []
    for stem, result in stored(folder).items():
        name = stem.rpartition("-")[0]
        if name not in PATHS or not is_born(result):
            continue
        commit = result["birth"]["commit"]
        paths = changed_since(commit, PATHS[name])
        said = f"as measured, commit {commit[:7]}"
        if paths is None:
            said = f"unknown, git or commit {commit[:7]} is not here (a shallow clone, an sdist)"
        elif paths:
            more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
            said = f"marked, since commit {commit[:7]}: {' '.join(paths[:4])}{more}"
        found.append(f"{stem}: {said}")
    return found
