"""The way to the CUDA kernels: the native module, the stream to launch on, the device and the tables it can read.

The native module ``_cuda`` is loaded by the first call, that is, once there is a CUDA tensor. So importing the package
neither maps the GPU code nor initializes the driver, which would forbid CUDA in forked processes. Tests replace
``native``, ``launching``, ``facts`` and ``memory`` here, and ``module_for`` of ``_library``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import _C, _native
from qlora_native.ops import _library
from qlora_native.ops._library import Weight, say_once


@cache
def native() -> ModuleType | None:
    """The module ``_cuda``, or None, and a warning why, where torch has a device but these kernels cannot run on it."""
    slower = "dequantizing with torch's own operations, which is slower."
    if not _C.build_info()["cuda_archs"]:
        say_once(
            f"qlora_native: this build has no CUDA kernels; {slower} Reinstall it from source with nvcc on PATH and "
            "QLORA_NATIVE_CUDA=ON."
        )
        return None
    from qlora_native import _cuda

    if _cuda.device_count() == 0:
        built, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in (_cuda.runtime_version(), _cuda.driver_version()))
        say_once(
            f"qlora_native: the kernels were built with CUDA {built}, the driver serves up to CUDA {driver}; {slower} "
            "Update the driver, or reinstall from source with an older nvcc."
        )
        return None
    return _cuda


@contextmanager
def launching(device: torch.device) -> Iterator[int]:
    """Makes a device the current one and gives the handle of torch's current stream there, to launch on."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


Run = Callable[..., None] | None  # a native function, or None where there is none for the device


def function(name: str, device: torch.device) -> Run:
    """``name`` of the module ``_cuda`` on a device's current stream; None where ``module_for`` has none."""
    module = _library.module_for(device)
    if module is None:
        return None

    def run(*arguments: Any) -> None:
        with launching(device) as stream:
            getattr(module, name)(*arguments, stream)

    return run


class Facts(NamedTuple):
    """What the choice of a kernel depends on."""

    compute_capability: int  # 10 * major + minor, e.g. 86
    sm_count: int


@cache
def facts(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    return Facts(10 * properties.major + properties.minor, properties.multi_processor_count)


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device that are free, and all of them, as its driver has it."""
    return torch.cuda.mem_get_info(device)


# Copying from pageable memory waits for the device, so a table is complete before any other stream can read it.
@cache
def _tables_on(device: torch.device, quant_type: int) -> tuple[Tensor, Tensor]:
    """The built-in levels, fp32 [16], and the code of double quantization, fp32 [256], in the device's memory."""
    return _native.levels(quant_type).to(device, copy=True), _native.nested_code().to(device, copy=True)


def with_tables(weight: Weight) -> Weight:
    """The weight with the tables that it leaves to the build: kernels on a device cannot read the host's."""
    code, nested_code = _tables_on(weight.packed.device, weight.quant_type)
    return weight._replace(
        code=code if weight.code is None else weight.code,
        nested_code=nested_code if weight.nested_code is None else weight.nested_code,
    )
