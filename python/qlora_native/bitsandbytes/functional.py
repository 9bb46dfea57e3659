"""The functions of ``bitsandbytes.functional`` around 4-bit and 8-bit blockwise quantization, and ``matmul_4bit``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native._native import quant_type_number
from qlora_native.bitsandbytes.state import QuantState
from qlora_native.ops._direct import unobserved
from qlora_native.ops._engine import autocast
from qlora_native.ops.linear_4bit import product
from qlora_native.weight import STORAGE_DTYPES, quantize

__all__ = ["QuantState", "gemv_4bit", "get_4bit_type"]
__all__ += [
    f"{step}_{form}"
    for step in ("quantize", "dequantize")
    for form in ("4bit", "blockwise", "fp4", "nf4")
]


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"qlora_native.bitsandbytes.functional has no {name!r}: it offers {', '.join(__all__)}. For 8-bit maps call "
        "quantize_blockwise, without code for the signed dynamic one, or give it any fp32 [256], sorted."
    )


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
        blocksize: elements a scale, a power of two from 32 to 4096; default 64.
        compress_statistics: store the scales in 8 bits.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are viewed as: uint8, bfloat16, float16 or float32.

    Returns ``quant_storage`` [ceil(n/2) / itemsize, 1] and the state. Raises ValueError for another dtype, type or
    block size, a non-finite element, or bytes that do not fill whole elements of ``quant_storage``.
    """
    blocksize = 64 if blocksize is None else blocksize
    w = quantize(A, quant_type=quant_type, block_size=blocksize, double_quant=compress_statistics)
    packed = w.packed
    if quant_storage not in STORAGE_DTYPES or packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quantize_4bit: {packed.numel()} packed bytes are no whole number of {quant_storage} elements: "
            "quant_storage is uint8, or bfloat16, float16 or float32 where their size divides the bytes."
        )
    state2 = None
    if w.nested_absmax is not None:
        nested_code = _native.nested_code().clone().to(A.device)
        state2 = QuantState(
            w.nested_absmax, code=nested_code, blocksize=reference.NESTED_BLOCK, dtype=torch.float32
        )
    code = get_4bit_type(quant_type, device=A.device)
    state = QuantState(
        w.absmax, A.shape, code, blocksize, quant_type, A.dtype, w.nested_offset, state2
    )
    packed = packed.view(quant_storage).reshape(-1, 1)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed if out is None else out.copy_(packed), state


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
        absmax, blocksize, quant_type: in place of a state; shape and dtype are then those of ``out``.
        out: written, and returned.

    Raises ValueError for neither a state nor absmax and out, and for tensors that do not fit each other.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: without a quant_state both absmax and out are needed.")
        block = 64 if blocksize is None else blocksize
        quant_state = QuantState(
            absmax, shape=out.shape, blocksize=block, quant_type=quant_type, dtype=out.dtype
        )
    arguments = quant_state.op_args(A)
    if out is None:
        result: Tensor = torch.ops.qlora_native.dequantize_4bit(quant_state.dtype, *arguments)
        return result
    torch.ops.qlora_native.dequantize_4bit.out(out, *arguments)
    return out


def without(function: Callable[..., Any], name: str, value: object) -> Any:
    """``function`` of one value of an argument, which its signature does not have, also not by position."""
    signature = inspect.signature(function)
    at = list(signature.parameters).index(name)
    left = [parameter for parameter in signature.parameters.values() if parameter.name != name]

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if len(args) > at:
            return function(*args[:at], value, *args[at:], **options)
        return function(*args, **options, **{name: value})

    call.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return call


quantize_fp4 = without(quantize_4bit, "quant_type", "fp4")
quantize_nf4 = without(quantize_4bit, "quant_type", "nf4")
dequantize_fp4 = without(dequantize_4bit, "quant_type", "fp4")
dequantize_nf4 = without(dequantize_4bit, "quant_type", "nf4")


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
        code: fp32 [256], sorted; default the signed dynamic map.
        absmax, out: filled with the scales and the codes, and returned in their place.
        blocksize: elements a scale, any number above 0.
        nested: quantize the scales less their mean likewise.

    Returns uint8 of A's shape and the state. Exact: a tie takes the even index, a block of zeros the code of 0. Raises
    ValueError for another dtype or block size.
    """
    if blocksize <= 0:
        raise ValueError(f"quantize_blockwise: blocksize is {blocksize}: expected a number above 0.")
    if A.dtype not in _native.DTYPE_NUMBER:
        raise ValueError(f"quantize_blockwise: A is {A.dtype}: expected float32, bfloat16 or float16.")
    table = (_native.nested_code() if code is None else code).to(A.device, copy=True)
    codes, scales = reference.quantize_blockwise(A, table, blocksize)
    offset = state2 = None
    if nested:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    if absmax is not None:
        scales = absmax.copy_(scales)
    state = QuantState(
        scales, code=table, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2
    )
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
        nested: ignored; the state has it.

    Raises ValueError for neither state nor absmax, and for codes that are not uint8.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: quant_state or absmax is needed.")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"dequantize_blockwise: A is {A.dtype}: expected uint8.")
    values = quant_state.decode(A)
    return values.to(quant_state.dtype) if out is None else out.copy_(values)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A W^T for the weight [N, K] packed in ``B``; A is [..., K] with any number of rows, the result [..., N].

    :func:`matmul_4bit` without a bias. ``transposed_A`` and ``transposed_B`` are ignored: ``B`` may be transposed, the
    shape is the state's.
    """
    return matmul_4bit(A, B, state, out)


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState | None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A W^T + bias, [..., N] in A's dtype, for the weight [N, K] of ``quant_state``; differentiable in A and bias.

    Args:
        A: [..., K], float32, bfloat16 or float16.
        B: the packed bytes, transposed or not.
        quant_state: of the weight. One made from a [K, N] tensor still works, by a dense copy, with a warning.
        out: written, and returned.
        bias: [N] or None.

    Raises ValueError for no state, a weight that is no matrix, and shapes that do not fit.
    """
    if quant_state is None:
        raise ValueError(
            "matmul_4bit: quant_state is None: give the state that quantize_4bit returned."
        )
    if len(quant_state.shape) != 2:
        raise ValueError(
            f"matmul_4bit: the weight is {list(quant_state.shape)}: expected two dimensions, [N, K]."
        )
    n, k = quant_state.shape
    if A.shape[-1] == n != k:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"matmul_4bit: the weight is {list(quant_state.shape)}, which fits A {list(A.shape)} only as [K, N]. "
                "Re-quantize from the weight in [N, K] orientation: as it is, every product makes a dense copy of it.",
                DeprecationWarning,
                stacklevel=2,
            )
        y = torch.nn.functional.linear(A, dequantize_4bit(B, quant_state).to(A.dtype).t(), bias)
    else:
        y = linear(A, B, quant_state, bias)
    return y if out is None else out.copy_(y)


def linear(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """x W^T + bias: straight to the native kernel where nothing observes the call, else by ``torch.ops``."""
    arguments = state.op_args(packed)
    if unobserved(x, bias):
        y = product(state._prepared.matrix(arguments), x, bias)
        if y is not None:
            return y
    x, bias = autocast(x, bias)  # type: ignore[assignment]
    result: Tensor = torch.ops.qlora_native.linear_4bit(x, bias, *arguments)
    return result


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = 64
) -> Tensor:
    """The 16 levels of the type "nf4" or "fp4", fp32 [16], indexed by code.

    ``device`` None is a CUDA device if there is one, else the CPU; ``blocksize`` is ignored. Raises
    NotImplementedError for any other type.
    """
    if typename not in _native.CODEBOOKS:
        raise NotImplementedError(f"get_4bit_type: typename is {typename!r}: expected 'nf4' or 'fp4'.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _native.levels(quant_type_number(typename)).clone().to(device)
