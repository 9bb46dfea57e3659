"""dequantize_4bit: a quantized weight, or a panel of it, to a float tensor."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import Weight, fake, implement


def check(dtype: torch.dtype) -> None:
    """Refuses dtypes that a weight cannot be decoded to."""
    if dtype not in DTYPE_NUMBER:
        raise ValueError(f"dequantize: dtype is {dtype}: expected float32, bfloat16 or float16.")


def decode_panel(
    pointers: tuple[int, ...], row_length: int, rows: tuple[int, int], columns: tuple[int, int], out: Tensor
) -> None:
    """Decodes rows x columns of a CPU weight, seen with rows of ``row_length``, into the contiguous ``out``."""
    panel = (row_length, *rows, *columns)
    _C.dequantize_4bit(DTYPE_NUMBER[out.dtype], out.data_ptr(), *panel, pointers)


def decode_all(weight: Weight, out: Tensor) -> None:
    """Decodes a whole CPU weight into the contiguous ``out``."""
    numel = math.prod(weight.shape)
    if numel:
        decode_panel(weight.pointers(), numel, (0, 1), (0, numel), out)


@implement("dequantize_4bit", "CPU")
def cpu(dtype: torch.dtype, *arguments: Any) -> Tensor:
    check(dtype)
    weight = Weight(*arguments)
    out = torch.empty(weight.shape, dtype=dtype)
    decode_all(weight, out)
    return out


def check_out(out: Tensor, weight: Weight) -> None:
    """Refuses an output that does not fit the weight."""
    check(out.dtype)
    if list(out.shape) != list(weight.shape) or out.device != weight.packed.device:
        raise ValueError(
            f"dequantize: out is {list(out.shape)} on {out.device}: expected {list(weight.shape)} on "
            f"{weight.packed.device}."
        )


@implement("dequantize_4bit.out", "CPU")
def cpu_out(out: Tensor, *arguments: Any) -> None:
    weight = Weight(*arguments)
    check_out(out, weight)
    if out.is_contiguous():
        decode_all(weight, out)
    else:
        out.copy_(cpu(out.dtype, *arguments))


def launch(module: ModuleType, weight: Weight, out: Tensor) -> None:
    """Decodes a whole CUDA weight into the contiguous ``out`` on its device, in the order of torch's current stream."""
    from qlora_native.ops import _cuda_kernels

    if math.prod(weight.shape):
        with _cuda_kernels.launching(out.device) as stream:
            pointers = _cuda_kernels.with_tables(weight).pointers()
            module.dequantize_4bit(DTYPE_NUMBER[out.dtype], out.data_ptr(), stream, pointers)


@implement("dequantize_4bit", "CUDA")
def cuda(dtype: torch.dtype, *arguments: Any) -> Tensor:
    from qlora_native.ops import _cuda_kernels

    check(dtype)
    module = _cuda_kernels.native()
    if module is None:
        return reference.dequantize(dtype, *arguments)
    weight = Weight(*arguments)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    launch(module, weight, out)
    return out


@implement("dequantize_4bit.out", "CUDA")
def cuda_out(out: Tensor, *arguments: Any) -> None:
    from qlora_native.ops import _cuda_kernels

    weight = Weight(*arguments)
    check_out(out, weight)
    module = _cuda_kernels.native()
    if module is not None and out.is_contiguous():
        launch(module, weight, out)
    else:
        out.copy_(cuda(out.dtype, *arguments))


@implement("dequantize_4bit", "CompositeExplicitAutograd")
def anywhere(dtype: torch.dtype, *arguments: Any) -> Tensor:
    check(dtype)
    return reference.dequantize(dtype, *arguments)


@implement("dequantize_4bit.out", "CompositeExplicitAutograd")
def anywhere_out(out: Tensor, *arguments: Any) -> None:
    check_out(out, Weight(*arguments))
    out.copy_(reference.dequantize(out.dtype, *arguments))


@fake("dequantize_4bit")
def shapes(dtype: torch.dtype, *arguments: Any) -> Tensor:
    check(dtype)
    weight = Weight(*arguments)
    return weight.packed.new_empty(weight.shape, dtype=dtype)


@fake("dequantize_4bit.out")
def out_shapes(out: Tensor, *arguments: Any) -> None:
    check_out(out, Weight(*arguments))
