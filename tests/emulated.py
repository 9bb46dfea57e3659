"""The CUDA branch of the ops on CPU tensors: the same bindings and kernels, linked over the emulator of a device.

The module is built by cmake/emulated.cmake as ``_cuda`` into a folder of its own, ``build/emulated`` by default.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qlora_native.ops import _cuda_kernels, _direct, _library

FOLDER = Path(__file__).resolve().parents[1] / "build" / "emulated"
# The kernels of a device with these numbers are chosen; few multiprocessors, so that small sizes are cut in parts too.
FACTS = _cuda_kernels.Facts(compute_capability=80, sm_count=4)
BUILD = (
    "cmake -S . -B build/emulated -DQLORA_NATIVE_EMULATED=ON && cmake --build build/emulated --target _cuda_emulated"
)


@cache
def load(folder: str) -> ModuleType | None:
    """The module, or None if it is not there."""
    for file in sorted(Path(folder).rglob("_cuda.*.so")):
        spec = importlib.util.spec_from_file_location("_cuda", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


def module_or_skip(config: pytest.Config) -> ModuleType:
    """The module; without it the test is skipped, in words."""
    module = load(config.getoption("--emulated") or str(FOLDER))
    if module is None:
        pytest.skip(f"the kernels are not built over the emulator: {BUILD}")
    return module


@contextmanager
def registered_on_cpu() -> Iterator[None]:
    """While it is entered, CPU tensors go to the ops' CUDA implementations, past no other."""
    library = torch.library.Library("qlora_native", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is what is meant
        for (name, key), function in _library.IMPLEMENTATIONS.items():
            if key == "CUDA":
                library.impl(name, function, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


class Launches:
    """Where the ops launch: on the stream ``stream``. Keeps the device and the stream of each launch."""

    def __init__(self) -> None:
        self.stream = 0
        self.seen: list[tuple[torch.device, int]] = []

    @contextmanager
    def launching(self, device: torch.device) -> Iterator[int]:
        self.seen.append((device, self.stream))
        yield self.stream


@contextmanager
def kernels(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The ops take the emulated kernels for CPU tensors while this is entered."""
    launches = Launches()
    replacements: dict[str, Callable[..., object]] = {
        "native": lambda: module,
        "launching": launches.launching,
        "facts": lambda device: FACTS,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(_cuda_kernels, name, replacement)
    monkeypatch.setattr(_direct, "_TENSOR_KEYS", frozenset())  # through the dispatcher, always
    with registered_on_cpu():
        yield launches
