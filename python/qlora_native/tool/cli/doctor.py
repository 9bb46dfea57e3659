"""``qlora doctor``: what this machine and this installation offer, and the command that installs what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_native import _C, build_info
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops import _cuda_kernels, _library
from qlora_native.tool.cli._run import add_to, missing_packages, print_result, require

# What the extras of pyproject.toml bring, as import names; a test compares the two.
EXTRAS = {
    "train": "transformers pydantic yaml rich jinja2 gguf accelerate sentencepiece matplotlib",
    "bench": "peft bitsandbytes kernels xllamacpp",
}
OPTIONAL = ("bench",)  # no command needs them
VERSIONS = "torch numpy safetensors transformers tokenizers pydantic rich gguf peft bitsandbytes"
VERSIONS += " tensorboard trackio wandb mlflow"
TOKENS = (1, 16, 512)  # of generating, of a few rows at once, of training


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("model", "MODEL", "also list its layers: 4-bit or why not, adapted, which kernel", nargs="?")
    add("--json", None, "print one JSON object")
    parser.epilog = """Exits with 0 also if something is missing: only what you want to use need be there. Of MODEL only
the configuration is read.

examples:
  qlora doctor
  qlora doctor Llama-3.1-8B-Instruct"""


def examine() -> dict[str, Any]:
    """Everything the command prints, as JSON values."""
    build = build_info()
    devices = _cuda_devices()
    versions = dict[str, str]()
    for name in VERSIONS.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found: list[dict[str, Any]] = [
        {"extra": extra, "packages": packages, "mend": f"pip install {' '.join(packages)}"}
        for extra, names in EXTRAS.items()
        if (packages := missing_packages(names.split()))
    ]
    missing = [item for item in found if item["extra"] not in OPTIONAL]
    missing += _missing_kernels()
    return {
        "build": build,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "versions": versions,
        "cuda_devices": devices,
        "paging": _paging(Path.cwd()),
        "missing": missing,
        "optional": [item for item in found if item["extra"] in OPTIONAL],
    }


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.model:
        require("qlora doctor MODEL", "transformers", "yaml")
        from qlora_native.tool.cli.bench import four_bit_of, layer_shapes
        from qlora_native.weights.shapes import kinds

        meta, weights = four_bit_of(args.model)
        report["layers"] = kinds(meta.model, weights)
        report["kernels"] = [
            {"n": n, "k": k, "layers": count, "tokens": m, "kernel": _kernel(m, n, k)}
            for (n, k), count in sorted(Counter(layer_shapes(args.model)).items())
            for m in TOKENS
        ]
    print_result(args, report, _lines(report), indent=2)
    return 0


def _lines(report: dict[str, Any]) -> Iterator[str]:
    build = report["build"]
    memory = f", {report['memory_bytes'] / 2**30:.1f} GiB of memory" if report["memory_bytes"] else ""
    rows = [
        ("qlora_native", f"{build['version']}, compiled by {build['compiler']}"),
        ("CPU kernels", f"{build['cpu_isa']} in use; built: {', '.join(build['isas_built'])}"),
        (
            "CUDA kernels",
            f"for compute capability {build['cuda_archs']}"
            if build["cuda"]
            else f"not built: {build['cuda_lacking']}",
        ),
        (
            "machine",
            f"{report['system']}, {report['cpu_cores']} cores, torch uses {report['threads']} threads{memory}",
        ),
        *(("CUDA device", device) for device in report["cuda_devices"] or ["none"]),
        ("paging", _paging_in_words(report["paging"])),
        ("Python", report["python"]),
        *report["versions"].items(),
    ]
    rows += [
        (
            f"[{row['n']}, {row['k']}]",
            f"{row['layers']} layers, {row['tokens']} tokens: {row['kernel']}",
        )
        for row in report.get("kernels", ())
    ]
    rows += report.get("layers", {}).items()
    width = max(len(name) for name, _ in rows)
    yield from (f"{name:<{width}}  {value}" for name, value in rows)
    for item in report["missing"]:
        yield f"missing: {', '.join(item['packages'])}; mend with: {item['mend']}"
    if not report["missing"]:
        yield "nothing is missing"
    for item in report["optional"]:
        yield f"not installed, needed by benches alone: {', '.join(item['packages'])} ({item['mend']})"


def _kernel(m: int, n: int, k: int) -> str:
    """What multiplies m tokens by a 4-bit weight [n, k] in bf16 in the forward pass."""
    from qlora_native.ops import _cuda_products

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        module = _library.module_for(device)
        if module is None:
            return "torch's operations on decoded weights: there are no CUDA kernels"
        sizes = _cuda_products.Sizes(m, n, k, 0, 64, DTYPE_NUMBER[torch.bfloat16], True)
        return str(_cuda_products.plan_of(module, sizes, device))
    isa = _C.cpu_isa()
    if m == 1:
        return f"rows of the weight, one stream a thread ({isa})"
    weights = "tiles of decoded panels" if isa == "amx" else "decoded columns"
    return f"{weights} ({isa}); rows of the weight for a few tokens"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _paging(folder: Path) -> dict[str, Any]:
    """Whether optimizer states can be paged into a file in this folder (found by making one), and the memory limit."""
    from qlora_native._memory import file_system_of, free_memory

    free = free_memory()
    report: dict[str, Any] = {
        "folder": str(folder),
        "file_system": file_system_of(folder),
        "free_bytes": shutil.disk_usage(folder).free,
        "refused": None,
        "memory": None
        if free is None
        else {"limit": free.name, "bytes": free.limit, "free_bytes": free.bytes},
    }
    try:
        _C.FileStore(_C.page_bytes, str(folder), True)
    except (OSError, MemoryError) as error:
        report["refused"] = str(error)
    return report


def _paging_in_words(report: dict[str, Any]) -> str:
    memory = report["memory"]
    words = f"{report['folder']}: {report['refused']}"
    if report["refused"] is None:
        kind = report["file_system"] or "unknown file system"
        words = f"possible in {report['folder']} ({kind}, {report['free_bytes'] / 2**30:.1f} GiB free)"
    if memory is not None:
        free = memory["free_bytes"] / 2**30
        limit = memory["bytes"] / 2**30
        words += f"; {free:.1f} of {limit:.1f} GiB free by {memory['limit']}"
    return words


def _missing_kernels() -> list[dict[str, Any]]:
    """Why devices have no kernels, in the form of missing packages; a reason that several share once."""
    numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    found = (_cuda_kernels.examined(torch.device("cuda", number)) for number in numbers)
    return [
        {"extra": None, "packages": [f"CUDA kernels: {reason}"], "mend": mend}
        for reason, mend in dict.fromkeys(
            item for item in found if isinstance(item, _cuda_kernels.Missing)
        )
    ]


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        words = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
        module = _library.module_for(torch.device("cuda", number))
        if module is not None:  # without the kernels there is no paging either
            moves = module.has_concurrent_managed_access(number)
            words += (
                ", paging by managed memory"
                if moves
                else ", paging by pinned host memory, if train.paged is true"
            )
        devices.append(words)
    return devices
