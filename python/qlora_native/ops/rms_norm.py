"""rms_norm: weight * x / rms(x) over the last axis. Backward keeps x, as it came, and one fp32 number a row.

The weight's gradient is of torch's operations, on every device: QLoRA freezes the weights of norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import Run, autograd, fake, implement, implement_natively

Pair = tuple[Tensor, Tensor]


@fake("rms_norm")
def shapes(x: Tensor, weight: Tensor, eps: float) -> Pair:
    """The outputs, uninitialized."""
    if weight.shape[0] == 0:
        raise ValueError(f"rms_norm: x is {list(x.shape)}: expected [..., K], K > 0.")
    return empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@implement("rms_norm", "CompositeExplicitAutograd")
def anywhere(x: Tensor, weight: Tensor, eps: float) -> Pair:
    shapes(x, weight, eps)
    y, rstd = reference.rms_norm(x, weight, eps)
    return y.contiguous(), rstd.contiguous()


@implement_natively("rms_norm", anywhere)
def native(run: Run, x: Tensor, weight: Tensor, eps: float) -> Pair:
    y, rstd = shapes(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    source = DTYPE_NUMBER[x.dtype], x.data_ptr(), weight.data_ptr(), eps, rstd.numel(), weight.shape[0]
    run(*source, y.data_ptr(), rstd.data_ptr())
    return y, rstd


@implement("rms_norm_backward", "CompositeExplicitAutograd")
def anywhere_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float) -> Tensor:
    return reference.rms_norm_backward(grad_y, x, weight, eps).contiguous()


@implement_natively("rms_norm_backward", anywhere_backward)
def native_backward(run: Run, grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float) -> Tensor:
    grad_y, x, weight, rstd = grad_y.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    grad_x = empty_like(x)
    source = grad_y.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), rstd.numel(), weight.shape[0]
    run(DTYPE_NUMBER[x.dtype], *source, grad_x.data_ptr())
    return grad_x


@fake("rms_norm_backward")
def backward_shapes(grad_y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, weight, eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])
    ctx.eps = eps


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        if torch.is_grad_enabled():  # this gradient is differentiated in turn
            grad_x = reference.rms_norm_backward(grad_y, x, weight, ctx.eps)
        else:
            grad_x = call("rms_norm_backward", grad_y, x, weight, rstd, ctx.eps)
    if ctx.needs_input_grad[1]:
        normal = reference.rms_norm(x, torch.ones_like(weight), ctx.eps)[0]
        products = grad_y.to(rstd.dtype) * normal
        grad_weight = products.reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    return grad_x, grad_weight, None


autograd("rms_norm", _backward, _setup)
