"""matmul_4bit: activations times a packed weight."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from qlora_native.bitsandbytes.functional import dequantize_4bit
from qlora_native.bitsandbytes.state import QuantState
from qlora_native.functional import autocast
from qlora_native.ops._direct import product, unobserved


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState | None, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A W^T + bias for the weight [N, K] that ``quant_state`` describes; differentiable in A and bias.

    Args:
        A: [..., K], float32, bfloat16 or float16.
        B: the packed bytes, transposed or not.
        quant_state: of the weight. One made from a [K, N] tensor still works, by a dense copy, with a warning.
        out: written, and returned.
        bias: [N] or None.

    Returns:
        [..., N] in A's dtype.

    Raises:
        ValueError: no state, a weight that is no matrix, shapes that do not fit.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is None: give the state that quantize_4bit returned.")
    if len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit: the weight is {list(quant_state.shape)}: expected two dimensions, [N, K].")
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
    """x W^T + bias: straight to the native kernel where nothing looks on, else by ``torch.ops``."""
    arguments = state.op_args(packed)
    if unobserved(x, bias):
        y = product(state._prepared.matrix(arguments), x, bias)
        if y is not None:
            return y
    x, bias = autocast(x, bias)  # type: ignore[assignment]
    result: Tensor = torch.ops.qlora_native.linear_4bit(x, bias, False, *arguments)
    return result
