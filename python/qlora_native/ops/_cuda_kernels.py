"""The ops' CUDA kernels. The native module ``_cuda`` is loaded by the first call, that is, once there is a CUDA tensor.

So importing the package neither maps the GPU code nor wakes the driver, which would forbid CUDA to forked processes.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .. import _C, _native, reference
from ._library import Weight, implement, native_dtype, say_once, weight_of
from .dequantize_4bit import check, check_out


@cache
def native() -> ModuleType | None:
    """The module ``_cuda``, or None, and a warning why, where torch has a device but these kernels cannot run on it."""
    slower = "dequantising with torch's own operations, which is slower."
    if not _C.build_info()["cuda_archs"]:
        say_once(
            f"qlora_native: this build has no CUDA kernels; {slower} Reinstall it from source with nvcc on PATH and "
            "QLORA_NATIVE_CUDA=ON."
        )
        return None
    from .. import _cuda

    if _cuda.device_count() == 0:
        built, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in (_cuda.runtime_version(), _cuda.driver_version()))
        say_once(
            f"qlora_native: the kernels were built with CUDA {built}, the driver serves up to CUDA {driver}; {slower} "
            "Update the driver, or reinstall from source with an older nvcc."
        )
        return None
    return _cuda


# Copying from pageable memory waits for the device, so a table is complete before any other stream can read it.
@cache
def levels_on(device: torch.device, quant_type: int) -> torch.Tensor:
    """The built-in levels of a quantisation type in the device's memory, fp32 [16]."""
    return _native.levels(quant_type).to(device, copy=True)


@cache
def nested_code_on(device: torch.device) -> torch.Tensor:
    """The built-in code of double quantisation in the device's memory, fp32 [256]."""
    return _native.nested_code().to(device, copy=True)


def with_tables(weight: Weight) -> Weight:
    """The weight with the tables that it leaves to the build: kernels on a device cannot read the host's."""
    device = weight.packed.device
    return weight._replace(
        code=levels_on(device, weight.quant_type) if weight.code is None else weight.code,
        nested_code=nested_code_on(device) if weight.nested_code is None else weight.nested_code,
    )


def decode_all(module: ModuleType, weight: Weight, out: torch.Tensor) -> None:
    """Decodes a whole weight into the contiguous ``out``, on its device, in the order of torch's current stream."""
    if math.prod(weight.shape) == 0:
        return
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        module.dequantize_4bit(native_dtype(out.dtype), out.data_ptr(), stream, *with_tables(weight).pointers())


@implement("dequantize_4bit", "CUDA")
def dequantize(dtype: torch.dtype, *arguments: Any) -> torch.Tensor:
    check(dtype)
    module = native()
    if module is None:
        return reference.dequantize(dtype, *arguments)
    weight = weight_of(arguments)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    decode_all(module, weight, out)
    return out


@implement("dequantize_4bit.out", "CUDA")
def dequantize_out(out: torch.Tensor, *arguments: Any) -> None:
    weight = weight_of(arguments)
    check_out(out, weight)
    module = native()
    if module is not None and out.is_contiguous():
        decode_all(module, weight, out)
    else:
        out.copy_(dequantize(out.dtype, *arguments))
