"""causal_attention: attention in which no position sees a later one, with key heads shared by groups of query heads.

Nothing of size [T, T] is kept: backward computes the scores again. The native kernel takes fp32, bf16 and fp16 and
heads of a multiple of 8 dimensions; others are computed plainly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import autograd, fake, implement

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
ALIGNMENT = 64


@fake("causal_attention")
def shapes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Pair:
    """The outputs, uninitialized; refuses heads that do not fit each other."""
    if not scale > 0:  # the largest score of a row is that of the largest product
        raise ValueError(f"causal_attention: scale is {scale}: expected more than 0.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"causal_attention: q is {list(q.shape)}, k is {list(k.shape)}, v is {list(v.shape)}: "
            "expected q [B, H, T, D], k and v [B, H / g, T, D]."
        )
    return _output(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@fake("causal_attention_backward")
def backward_shapes(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Triple:
    """The gradients, uninitialized; refuses heads that do not fit each other."""
    shapes(q, k, v, scale)
    return _output(q), _output(k), _output(v)


def is_native(q: Tensor) -> bool:
    """Whether the CPU kernel takes such heads."""
    return q.dtype in DTYPE_NUMBER and q.shape[-1] % 8 == 0 and q.numel() > 0


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _output(q: Tensor) -> Tensor:
    """[B, H, T, D] with the heads of a position side by side, as the product behind reads them."""
    batch, heads, length, width = q.shape
    return empty_like(q, (batch, length, heads, width)).transpose(1, 2)


def _scratch(dtype: int, shape: tuple[int, ...], backward: bool) -> Tensor:
    scratch = torch.empty(_C.causal_attention_scratch_bytes(dtype, shape, backward) + ALIGNMENT, dtype=torch.uint8)
    return scratch[-scratch.data_ptr() % ALIGNMENT :]


@implement("causal_attention", "CPU")
def cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Pair:
    if not is_native(q):
        return anywhere(q, k, v, scale)
    out, lse = shapes(q, k, v, scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    dtype, shape = DTYPE_NUMBER[q.dtype], (*q.shape[:2], k.shape[1], *q.shape[2:])
    scratch = _scratch(dtype, shape, backward=False)
    _C.causal_attention(
        dtype, shape, scale, _heads(q), _heads(k), _heads(v), _heads(out), lse.data_ptr(), scratch.data_ptr()
    )
    return out, lse


@implement("causal_attention", "CompositeExplicitAutograd")
def anywhere(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Pair:
    out, lse = shapes(q, k, v, scale)
    values, sums = reference.causal_attention(q, k, v, scale)
    return out.copy_(values), lse.copy_(sums)


@implement("causal_attention_backward", "CPU")
def cpu_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Triple:
    if not is_native(q):
        return anywhere_backward(grad_out, q, k, v, out, lse, scale)
    grads = backward_shapes(grad_out, q, k, v, out, lse, scale)
    q, k, v, out, grad_out, lse = _rows(q), _rows(k), _rows(v), _rows(out), _rows(grad_out), lse.contiguous()
    dtype, shape = DTYPE_NUMBER[q.dtype], (*q.shape[:2], k.shape[1], *q.shape[2:])
    scratch = _scratch(dtype, shape, backward=True)
    sources: list[Any] = [*map(_heads, (q, k, v, out)), lse.data_ptr(), _heads(grad_out)]
    targets: list[Any] = [*map(_heads, grads), scratch.data_ptr()]
    _C.causal_attention_backward(dtype, shape, scale, *sources, *targets)
    return grads


@implement("causal_attention_backward", "CompositeExplicitAutograd")
def anywhere_backward(*arguments: Any) -> Triple:
    grads = backward_shapes(*arguments)
    grad_out, q, k, v, *_, scale = arguments
    for grad, values in zip(grads, reference.causal_attention_backward(grad_out, q, k, v, scale), strict=True):
        grad.copy_(values)
    return grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)
    ctx.scale = scale


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # these gradients are differentiated in turn
        return *reference.causal_attention_backward(grad_out, q, k, v, ctx.scale), None
    return *call("causal_attention_backward", grad_out, q, k, v, out, lse, ctx.scale), None


autograd("causal_attention", _backward, _setup)
