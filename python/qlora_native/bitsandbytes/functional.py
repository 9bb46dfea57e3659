"""The functions of ``bitsandbytes.functional`` around 4-bit and 8-bit blockwise quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native.bitsandbytes.maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from qlora_native.bitsandbytes.state import QuantState
from qlora_native.weight import STORAGE_DTYPES, quant_type_number

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize to 4 bits; the arithmetic is that of :func:`qlora_native.quantize`.

    Args:
        A: any shape, float32, bfloat16 or float16.
        absmax, out: filled with the scales and the packed bytes, and returned in their place.
        blocksize: elements a scale, a power of two from 32 to 4096; 64 unless given.
        compress_statistics: store the scales in 8 bits.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are seen as: uint8, bfloat16, float16 or float32.

    Returns:
        ``quant_storage`` [ceil(n/2) / itemsize, 1] and the state.

    Raises:
        ValueError: another dtype, type or block size, a non-finite element, or bytes that do not fill whole elements
            of ``quant_storage``.
    """
    blocksize = 64 if blocksize is None else blocksize
    packed, scales, nested_absmax, nested_offset = torch.ops.qlora_native.quantize_4bit(
        A.detach(), quant_type_number(quant_type), blocksize, compress_statistics
    )
    if quant_storage not in STORAGE_DTYPES or packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quantize_4bit: {packed.numel()} packed bytes are no whole number of {quant_storage} elements: "
            "quant_storage is uint8, or bfloat16, float16 or float32 where their size divides the bytes."
        )
    offset = state2 = None
    if compress_statistics:
        offset = nested_offset
        state2 = QuantState(
            nested_absmax,
            code=_native.nested_code().clone().to(A.device),
            blocksize=reference.NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = QuantState(
        scales,
        shape=A.shape,
        code=get_4bit_type(quant_type, device=A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    packed = packed.view(quant_storage).reshape(-1, 1)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed if out is None else out.copy_(packed), state


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with quant_type "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` with quant_type "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Decode to ``quant_state.shape`` and ``quant_state.dtype``: round(level * scale), one product, one rounding.

    Args:
        A: packed bytes in any storage dtype, any shape.
        quant_state: as :func:`quantize_4bit` returned it.
        absmax, blocksize, quant_type: in place of a state; ``out`` then tells shape and dtype.
        out: written, and returned.

    Raises:
        ValueError: neither a state nor absmax and out; tensors that do not fit each other.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: without a quant_state both absmax and out are needed.")
        block = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, shape=out.shape, blocksize=block, quant_type=quant_type, dtype=out.dtype)
    arguments = quant_state.op_args(A)
    if out is None:
        result: Tensor = torch.ops.qlora_native.dequantize_4bit(quant_state.dtype, *arguments)
        return result
    torch.ops.qlora_native.dequantize_4bit.out(out, *arguments)
    return out


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with quant_type "fp4" where no state tells it."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` with quant_type "nf4" where no state tells it."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 8 bits: the index of the nearest value of ``code`` for each element over its block's absmax.

    Args:
        A: any shape, float32, bfloat16 or float16.
        code: fp32 [256], sorted; the signed dynamic map unless given.
        absmax, out: filled with the scales and the codes, and returned in their place.
        blocksize: elements a scale, any number above 0.
        nested: quantize the scales less their mean likewise.

    Returns:
        uint8 of A's shape and the state. Exact: a tie takes the even index, a block of zeros the code of 0.

    Raises ValueError for another dtype or block size.
    """
    _check_blocksize("quantize_blockwise", blocksize)
    if A.dtype not in DTYPES:
        raise ValueError(f"quantize_blockwise: A is {A.dtype}: expected float32, bfloat16 or float16.")
    table = (_native.nested_code() if code is None else code).to(A.device, copy=True)
    codes, scales = reference.quantize_blockwise(A, table, blocksize)
    offset = state2 = None
    if nested:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    if absmax is not None:
        scales = absmax.copy_(scales)
    state = QuantState(scales, code=table, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Decode 8-bit codes: code[A] * absmax of the block, in fp32, rounded once to the state's dtype.

    Args:
        A: uint8, any shape.
        quant_state: as :func:`quantize_blockwise` returned it.
        absmax, code, blocksize: in place of a state; the result is then float32.
        out: written, and returned.
        nested: not looked at; the state knows.

    Raises ValueError for neither state nor absmax, for codes that are not uint8, for a block size of 0 or less.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: quant_state or absmax is needed.")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"dequantize_blockwise: A is {A.dtype}: expected uint8.")
    block = _check_blocksize("dequantize_blockwise", quant_state.blocksize)
    table = (_native.nested_code() if quant_state.code is None else quant_state.code).to(A.device)
    values = reference.dequantize_blockwise(A, quant_state.scales(), table, block)
    if out is not None:
        return out.copy_(values)
    return values.to(quant_state.dtype)


def _check_blocksize(name: str, blocksize: int | None) -> int:
    if blocksize is None or blocksize <= 0:
        raise ValueError(f"{name}: blocksize is {blocksize}: expected a number above 0.")
    return blocksize


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A W^T for the weight [N, K] packed in ``B``; A is [..., K] with any number of rows, the result [..., N].

    Args:
        out: written, and returned.
        transposed_A, transposed_B: not looked at; ``B`` may be transposed, the state tells the shape.

    Raises ValueError without a state.
    """
    if state is None:
        raise ValueError("gemv_4bit: state is None: give the state that quantize_4bit returned.")
    y: Tensor = torch.ops.qlora_native.linear_4bit(A, None, False, *state.op_args(B))
    return y if out is None else out.copy_(y)


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"qlora_native.bitsandbytes.functional has no {name!r}: it offers what 4-bit weights and 8-bit states need "
        f"({', '.join(__all__)})."
    )
