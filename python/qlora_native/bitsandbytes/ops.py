"""``torch.ops.bitsandbytes.*``, on request, for code that calls bitsandbytes' operators by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qlora_native.bitsandbytes import functional
from qlora_native.bitsandbytes.state import QuantState


def _new_absmax(A: Tensor, blocksize: int) -> Tensor:
    return A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


def _new_product(A: Tensor, B: Tensor, shapeB: list[int], *others: object, **more: object) -> Tensor:
    return A.new_empty(*A.shape[:-1], shapeB[0])


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed, state = functional.quantize_4bit(
        A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage
    )
    return packed, state.absmax


def _dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    *out: Tensor,
) -> Tensor:
    state = QuantState(absmax, shape=shape, blocksize=blocksize, quant_type=quant_type, dtype=dtype)
    return functional.dequantize_4bit(A, state, out=out[0] if out else None)


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
    state = QuantState(absmax, shapeB, None, blocksize, quant_type, None, absmax_offset, state2)
    return functional.linear(A, B, state, bias)


def _gemv_4bit(
    A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    # The levels that are given win; this separates the built-in ones.
    quant_type = "fp4" if code[1] > 0 else "nf4"
    state = QuantState(absmax, shape=shapeB, code=code, blocksize=blocksize, quant_type=quant_type)
    return functional.gemv_4bit(A, B, state=state)


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


def _dequantize_blockwise(
    A: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    state = QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
    return functional.dequantize_blockwise(A, state, out=out)


def _fill(kernel: Callable[..., Any], *arguments: Any) -> None:
    kernel(*arguments)


# By schema: the kernel, and what makes empty results of fake tensors.
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)": (
        _quantize_4bit,
        lambda A, blocksize, quant_type, dtype: (
            A.new_empty(((A.numel() + 1) // (2 * dtype.itemsize), 1), dtype=dtype),
            _new_absmax(A, blocksize),
        ),
    ),
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) "
    "-> Tensor": (
        _dequantize_4bit,
        lambda A, absmax, blocksize, quant_type, shape, dtype: A.new_empty(shape, dtype=dtype),
    ),
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
    "Tensor(a!) out) -> ()": (partial(_fill, _dequantize_4bit), lambda *_: None),
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor": (
        _gemm_4bit,
        _new_product,
    ),
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor": (
        _gemv_4bit,
        _new_product,
    ),
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)": (
        _quantize_blockwise,
        lambda A, code, blocksize: (
            A.new_empty(A.shape, dtype=torch.uint8),
            _new_absmax(A, blocksize),
        ),
    ),
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor": (
        _dequantize_blockwise,
        lambda A, absmax, code, blocksize, dtype: A.new_empty(A.shape, dtype=dtype),
    ),
    "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, "
    "Tensor(a!) out) -> ()": (partial(_fill, _dequantize_blockwise), lambda *_: None),
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

    for schema, (kernel, shapes) in _OPS.items():
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bitsandbytes::{name}", shapes, lib=library)
    return library
