"""dequantize_4bit: a quantized weight, or a panel of it, to a float tensor: round(level[code] * scale of its block)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import cuda_kernels, fake, implement
from qlora_native.ops._operands import Weight


def check(dtype: torch.dtype) -> None:
    """Refuses dtypes that a weight cannot be decoded to."""
    if dtype not in DTYPE_NUMBER:
        raise ValueError(f"dequantize: dtype is {dtype}: expected float32, bfloat16 or float16.")


def decode_panel(
    pointers: tuple[int, ...],
    row_length: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Tensor,
) -> None:
    """Decodes rows x columns of a CPU weight, seen with rows of ``row_length``, into the contiguous ``out``."""
    panel = (row_length, *rows, *columns)
    _C.dequantize_4bit(DTYPE_NUMBER[out.dtype], out.data_ptr(), *panel, pointers)


def decode_all(weight: Weight, out: Tensor) -> None:
    """Decodes a whole CPU weight into the contiguous ``out``."""
    numel = math.prod(weight.shape)
    if numel:
        decode_panel(weight.pointers(), numel, (0, 1), (0, numel), out)


def decode_cuda(weight: Weight, out: Tensor) -> None:
    """The same, in plain torch where these kernels cannot run."""
    module = cuda_kernels().native(out.device)
    if module is None:
        return decode_anywhere(weight, out)
    from qlora_native.ops import _cuda_products

    _cuda_products.decode(module, weight, out)


def decode_anywhere(weight: Weight, out: Tensor) -> None:
    """Decodes in plain torch."""
    out.copy_(reference.dequantize(out.dtype, *weight))


def _register(device: str, decode: Callable[[Weight, Tensor], None]) -> None:
    """The kernels for a dispatch key; ``decode`` fills a contiguous tensor."""

    @implement("dequantize_4bit", device)
    def whole(dtype: torch.dtype, weight: Weight) -> Tensor:
        check(dtype)
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
        decode(weight, out)
        return out

    @implement("dequantize_4bit.out", device)
    def into(out: Tensor, weight: Weight) -> None:
        if out.is_contiguous():
            decode(weight, out)
        else:
            out.copy_(whole(out.dtype, weight))


_register("CPU", decode_all)
_register("CUDA", decode_cuda)
_register("CompositeExplicitAutograd", decode_anywhere)


@fake("dequantize_4bit")
def shapes(dtype: torch.dtype, weight: Weight) -> Tensor:
    check(dtype)
    return weight.packed.new_empty(weight.shape, dtype=dtype)


@fake("dequantize_4bit.out")
def out_shapes(out: Tensor, weight: Weight) -> None:
    """Nothing is returned."""
