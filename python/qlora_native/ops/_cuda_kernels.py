"""The way to the CUDA kernels: the native module of a device, the stream to launch on, facts of the device.

The native module ``_cuda`` is loaded by the first call, that is, once there is a CUDA tensor. So importing the package
neither maps the GPU code nor initializes the driver, which would forbid CUDA in forked processes. Tests replace
``native``, ``launching``, ``facts`` and ``memory`` here, and ``module_for`` of ``_library``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from qlora_native import _C
from qlora_native.errors import say_once

SLOWER = "its tensors go through torch's own operations, which is slower."


class Missing(NamedTuple):
    """Why a device has no kernels, and the command or step that gives it some."""

    reason: str
    mend: str


def _rebuild(settings: str = "") -> str:
    command = f"{settings}QLORA_NATIVE_CUDA=ON pip install --force-reinstall --no-deps ."
    return f"in a clone of the repository: {command}"


@cache
def _loaded() -> ModuleType | Missing:
    """The module ``_cuda``, or why its kernels run on no device."""
    build = _C.build_info()
    if not build["cuda_archs"]:
        # Only a compiler that this nvcc refuses has been seen to make it fail.
        host = "CUDAHOSTCXX=g++-12 " if " fails: " in build["cuda_lacking"] else ""
        driver = (
            ""
            if host
            else " (with a driver older than 580, CUDACXX=/path/of/CUDA-12/bin/nvcc in front)"
        )
        reason = f"this build has no CUDA kernels ({build['cuda_lacking']})"
        return Missing(reason, _rebuild(host) + driver)
    from qlora_native import _cuda

    if _cuda.device_count() == 0:
        built, driver = (
            f"{v // 1000}.{v % 1000 // 10}" for v in (_cuda.runtime_version(), _cuda.driver_version())
        )
        reason = f"the kernels were built with CUDA {built}, the driver serves up to CUDA {driver}"
        return Missing(reason, f"update the driver; or, {_rebuild('CUDACXX=/path/of/an/older/nvcc ')}")
    return _cuda


@cache
def examined(device: torch.device) -> ModuleType | Missing:
    """The module with the kernels of a CUDA device, or why they cannot run there."""
    module = _loaded()
    if isinstance(module, Missing):
        return module
    with launching(device):
        error = module.image_error()
    if not error:
        return module
    capability = facts(device).compute_capability
    major, minor = divmod(capability, 10)
    return Missing(
        f"{device} has compute capability {major}.{minor}, for which this build has no kernels: CUDA gave {error}, the "
        f"build has {_C.build_info()['cuda_archs']}",
        f"if it is 7.5 or newer, {_rebuild(f'QLORA_NATIVE_CUDA_ARCHS={capability} ')}",
    )


@cache
def native(device: torch.device) -> ModuleType | None:
    """The module with the kernels of a CUDA device; None, after a warning why, for one on which they cannot run."""
    found = examined(device)
    if isinstance(found, Missing):
        say_once(f"qlora_native: {found.reason}; {SLOWER} To mend it, {found.mend}")
        return None
    return found


def current_device() -> int:
    """The number of this thread's current device."""
    return torch.cuda.current_device()


def raw_stream(index: int) -> int:
    """The handle of torch's current stream on a device, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(index)


def launching(device: torch.device) -> AbstractContextManager[int]:
    """Makes a device the current one and gives the handle of torch's current stream there, to launch on."""
    current = current_device()
    if device.index in (None, current):
        return nullcontext(raw_stream(current))
    return _guarded(device.index)


@contextmanager
def _guarded(index: int) -> Iterator[int]:
    with torch.cuda.device(index):
        yield raw_stream(index)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Facts(NamedTuple):
    """What the choice of a kernel, and what is free, depend on."""

    compute_capability: int  # 10 * major + minor, e.g. 86
    sm_count: int
    is_integrated: bool = False  # the device's memory is the host's


@cache
def facts(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Facts(capability, properties.multi_processor_count, bool(properties.is_integrated))


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device that are free, and all of them, as its driver has it."""
    return torch.cuda.mem_get_info(device)
