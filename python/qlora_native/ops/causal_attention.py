"""causal_attention: softmax(scale q k^T) v in which no position sees a later one, key heads shared by groups of q's.

Nothing of size [T, T] is kept: beside the output [B, H, T, D], forward returns lse, the log of each softmax's sum, from
which backward computes the weights exp(scale q k^T - lse) again. The native kernel takes fp32, bf16 and fp16 and heads
of a multiple of 8 dimensions; others are computed plainly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._buffers import empty_like
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._direct import call
from qlora_native.ops._library import Function, Values, autograd, define
from qlora_native.ops._operands import WIDE

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
ALIGNMENT = 64


def outputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Pair:
    if not scale > 0:  # the largest score of a row is that of the largest product
        raise ValueError(f"causal_attention: scale is {scale}: expected more than 0.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"causal_attention: q is {list(q.shape)}, k is {list(k.shape)}, v is {list(v.shape)}: "
            "expected q [B, H, T, D], k and v [B, H / g, T, D]."
        )
    return _output(q), q.new_empty(q.shape[:3], dtype=WIDE[q.dtype])


def _output(q: Tensor) -> Tensor:
    """[B, H, T, D] with the heads of a position side by side, as the product behind reads them."""
    batch, heads, length, width = q.shape
    return empty_like(q, (batch, length, heads, width)).transpose(1, 2)


def is_native(q: Tensor) -> bool:
    """Whether the CPU kernel takes such heads."""
    return q.dtype in DTYPE_NUMBER and q.shape[-1] % 8 == 0 and q.numel() > 0


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of heads whose rows are contiguous."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _sizes(q: Tensor, k: Tensor) -> tuple[int, tuple[int, ...]]:
    batch, heads, length, width = q.shape
    return DTYPE_NUMBER[q.dtype], (batch, heads, k.shape[1], length, width)


def _scratch(dtype: int, shape: tuple[int, ...], backward: bool) -> Tensor:
    num_bytes = _C.causal_attention_scratch_bytes(dtype, shape, backward)
    scratch = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    return scratch[-scratch.data_ptr() % ALIGNMENT :]


def native(run: Function, results: Pair, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    out, lse = results
    q, k, v = _rows(q, k, v)
    sizes = _sizes(q, k)
    run(*sizes, scale, *map(_heads, (q, k, v, out)), lse, _scratch(*sizes, backward=False))


define("causal_attention", outputs, reference.causal_attention, native, False, is_native)


def grad_outputs(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Triple:
    outputs(q, k, v, scale)
    return _output(q), _output(k), _output(v)


def grad_values(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Triple:
    return reference.causal_attention_backward(grad_out, q, k, v, others[-1])


def native_grads(run: Function, grads: Triple, *arguments: Any) -> None:
    *heads, lse, scale = arguments
    grad_out, q, k, v, out = _rows(*heads)
    sizes = _sizes(q, k)
    sources = [*map(_heads, (q, k, v, out)), lse.contiguous(), _heads(grad_out)]
    run(*sizes, scale, *sources, *map(_heads, grads), _scratch(*sizes, backward=True))


# grad_out is of q's shape and dtype.
define("causal_attention_backward", grad_outputs, grad_values, native_grads, False, is_native)


def _setup(ctx: Any, inputs: Values, output: Pair) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> Values:
    if grad_out is None:
        return None, None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # these gradients are differentiated in turn
        return *reference.causal_attention_backward(grad_out, q, k, v, ctx.scale), None
    return *call("causal_attention_backward", grad_out, q, k, v, out, lse, ctx.scale), None


autograd("causal_attention", _backward, _setup)
