"""``torch.ops.bitsandbytes.*``, on request, for code that calls bitsandbytes' operators by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_native.bitsandbytes import functional
from qlora_native.bitsandbytes.products import linear
from qlora_native.bitsandbytes.state import QuantState

_SCHEMAS = {
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "dequantize_4bit": (
        "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor"
    ),
    "dequantize_4bit.out": (
        "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor(a!) out) -> ()"
    ),
    "gemm_4bit": (
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
        "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
    ),
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "dequantize_blockwise.out": (
        "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor(a!) out) -> ()"
    ),
}


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, state = functional.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return packed, state.absmax


def _quantize_4bit_shapes(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed = A.new_empty(((A.numel() + 1) // (2 * quant_storage.itemsize), 1), dtype=quant_storage)
    return packed, A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    state = QuantState(absmax, shape=shape, blocksize=blocksize, quant_type=quant_type, dtype=dtype)
    return functional.dequantize_4bit(A, state)


def _dequantize_4bit_shapes(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return A.new_empty(shape, dtype=dtype)


def _dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype, out: Tensor
) -> None:
    state = QuantState(absmax, shape=shape, blocksize=blocksize, quant_type=quant_type, dtype=dtype)
    functional.dequantize_4bit(A, state, out=out)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    state2 = None
    if absmax_8bit is not None:  # then absmax is that of the scales
        state2 = QuantState(absmax, code=absmax_code, blocksize=256, dtype=torch.float32)
        absmax = absmax_8bit
    state = QuantState(
        absmax, shape=shapeB, blocksize=blocksize, quant_type=quant_type, offset=absmax_offset, state2=state2
    )
    return linear(A, B, state, bias)


def _gemm_4bit_shapes(A: Tensor, B: Tensor, shapeB: list[int], *others: object, **more: object) -> Tensor:
    return A.new_empty(*A.shape[:-1], shapeB[0])


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    quant_type = "fp4" if code[1] > 0 else "nf4"  # the levels that are given win; this tells built-in ones apart
    state = QuantState(absmax, shape=shapeB, code=code, blocksize=blocksize, quant_type=quant_type)
    return functional.gemv_4bit(A, B, state=state)


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


def _quantize_blockwise_shapes(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return functional.dequantize_blockwise(A, QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype))


def _dequantize_blockwise_shapes(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return A.new_empty(A.shape, dtype=dtype)


def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    functional.dequantize_blockwise(A, QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype), out=out)


def _writes_out(*arguments: object, **more: object) -> None:
    """The shape function of ops that fill ``out``."""


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_4bit": (_quantize_4bit, _quantize_4bit_shapes),
    "dequantize_4bit": (_dequantize_4bit, _dequantize_4bit_shapes),
    "dequantize_4bit.out": (_dequantize_4bit_out, _writes_out),
    "gemm_4bit": (_gemm_4bit, _gemm_4bit_shapes),
    "gemv_4bit": (_gemv_4bit, _gemm_4bit_shapes),
    "quantize_blockwise": (_quantize_blockwise, _quantize_blockwise_shapes),
    "dequantize_blockwise": (_dequantize_blockwise, _dequantize_blockwise_shapes),
    "dequantize_blockwise.out": (_dequantize_blockwise_out, _writes_out),
}


@cache
def register_ops() -> torch.library.Library:
    """Define ``torch.ops.bitsandbytes.*`` for 4-bit weights and 8-bit states over this library's kernels; once.

    Not done on import, since the names are bitsandbytes' own. Raises RuntimeError if bitsandbytes has been imported.
    """
    if hasattr(torch.ops.bitsandbytes, "quantize_4bit"):
        raise RuntimeError(
            "register_ops: torch.ops.bitsandbytes is there already: bitsandbytes has been imported in this process; "
            "leave its import out."
        )
    library = torch.library.Library("bitsandbytes", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        kernel, shapes = _KERNELS[name]
        library.define(name + schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bitsandbytes::{name}", shapes, lib=library)
    return library
