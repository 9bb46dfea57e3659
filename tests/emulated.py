"""The CUDA branch of the ops on CPU tensors: the same bindings and kernels, linked over the emulator of a device.

The module is ``_cuda_emulated`` of tests/cuda_on_cpu/python, looked for in the folder ``build/emulated`` by default.
All of torch's memory passes for the device's there; ``emulated_torch.py`` separates them.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qlora_native import _C
from qlora_native.ops import _cuda_kernels, _cuda_products, _direct, _library

# The kernels of a device with these numbers are chosen; few multiprocessors, so that small sizes are split too.
FACTS = _cuda_kernels.Facts(compute_capability=80, sm_count=4)


def names_in_stub() -> set[str]:
    """What the module ``_cuda`` has, by its stub."""
    stub = (Path(_C.__file__).parent / "_cuda.pyi").read_text(encoding="utf-8")
    return set(re.findall(r"^(?:def |class )?(\w+)(?=\(|:)", stub, re.MULTILINE))


@cache
def load(folder: str, name: str = "_cuda_emulated") -> ModuleType | None:
    """The module, or None if it is not there."""
    for file in sorted(Path(folder).rglob(f"{name}.*.so")):
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


def module_or_skip(config: pytest.Config, name: str = "_cuda_emulated") -> ModuleType:
    """The module; without it the test is skipped, in words.

    In ``_cuda_emulated_checked`` every access of a kernel is looked at, which takes a few times as long.
    """
    folder = config.getoption("--emulated") or str(Path(__file__).resolve().parents[1] / "build" / "emulated")
    module = load(folder, name)
    if module is None:
        pytest.skip(
            "no emulator of a GPU in build/emulated: "
            "cmake -S . -B build/emulated -DQLORA_NATIVE_CUDA_ON_CPU=ON && "
            f"cmake --build build/emulated --target {name}"
        )
    return module


def arguments(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The keywords of a native function, with some of them or of the weight's fields changed."""
    fields = {"packed": 4096, "absmax": 4096, "absmax_codes": 0, "nested_absmax": 0, "nested_offset": 0}
    fields |= {"nested_code": 4096, "levels": 4096, "quant_type": 0, "numel": 64, "block_size": 64, **call["weight"]}
    fields |= {name: changes.pop(name) for name in fields if name in changes}
    return {**call, **changes, "weight": tuple(fields.values())}


class Emulator:
    """The module, and the stream that the ops launch on, which a test may change."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.stream = 0
        self.facts = FACTS
        self.play(0)
        self.launches()

    def play(self, schedule: int) -> None:
        """The device of ``facts``, and one of the ``module.num_schedules`` orders in which threads may run."""
        self.module.play(self.facts.compute_capability, self.facts.sm_count, schedule)

    def launches(self) -> list[tuple[int, int]]:
        """Thread blocks and stream of each launch since the last call."""
        found: list[tuple[int, int]] = self.module.take_launches()
        return found

    @contextmanager
    def launching(self, device: torch.device) -> Iterator[int]:
        yield self.stream


@contextmanager
def kernels(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The ops take the emulated kernels for CPU tensors while this is entered; what the emulator finds is an error."""
    emulator = Emulator(module)
    monkeypatch.setattr(_cuda_kernels, "native", lambda device: module)
    monkeypatch.setattr(_cuda_kernels, "launching", emulator.launching)
    monkeypatch.setattr(_cuda_kernels, "facts", lambda device: emulator.facts)
    monkeypatch.setattr(_cuda_kernels, "memory", lambda device: module.memory())
    monkeypatch.setattr(_cuda_products, "wide_product", lambda left, right: left.float() @ right.float())
    monkeypatch.setattr(_library, "module_for", lambda device: module)
    monkeypatch.setattr(_direct, "_TENSOR_KEYS", frozenset())
    monkeypatch.setattr(_direct, "_DEVICES", dict.fromkeys(_direct._DEVICES, "CUDA"))
    monkeypatch.setattr(_cuda_kernels, "raw_stream", lambda index: emulator.stream)
    _cuda_products.plan_of.cache_clear()
    module.take_reports()
    library = torch.library.Library("qlora_native", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is what is meant
        for (name, key), function in _library.IMPLEMENTATIONS.items():
            if key == "CUDA":
                library.impl(name, function, "CPU", allow_override=True)
    try:
        yield emulator
    finally:
        library._destroy()
    reports = module.take_reports()
    assert not reports, f"the emulator reports:\n{reports}"
