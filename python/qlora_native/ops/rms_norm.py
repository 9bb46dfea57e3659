"""rms_norm: y = weight * x * rstd over the last axis, rstd = 1 / sqrt(mean(x^2) + eps). Returns y and rstd.

With h = dL/dy * weight and n = x * rstd, dL/dx = rstd * (h - n * mean(h * n)). Backward keeps x, as it came, and rstd,
one number a row. The weight's gradient is of torch's operations, on every device: QLoRA freezes the weights of norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._buffers import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import Function, Values, autograd, define
from qlora_native.ops._operands import WIDE

Pair = tuple[Tensor, Tensor]


def outputs(x: Tensor, weight: Tensor, eps: float) -> Pair:
    if weight.shape[0] == 0:
        raise ValueError(f"rms_norm: x is {list(x.shape)}: expected [..., K], K > 0.")
    return empty_like(x), x.new_empty(x.shape[:-1], dtype=WIDE[x.dtype])


def native(run: Function, results: Pair, x: Tensor, weight: Tensor, eps: float) -> None:
    y, rstd = results
    x = x.contiguous()
    weight = weight.contiguous()
    run(x.dtype, x, weight, eps, rstd.numel(), weight.shape[0], y, rstd)


define("rms_norm", outputs, reference.rms_norm, native)


def grad_output(grad_y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def grad_values(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float) -> Tensor:
    return reference.rms_norm_backward(grad_y, x, weight, eps)


def native_grad(
    run: Function, grad_x: Tensor, grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float
) -> None:
    operands = [tensor.contiguous() for tensor in (grad_y, x, weight, rstd)]
    run(x.dtype, *operands, rstd.numel(), weight.shape[0], grad_x)


define("rms_norm_backward", grad_output, grad_values, native_grad)


def _setup(ctx: Any, inputs: Values, output: Pair) -> None:
    x, weight, ctx.eps = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> Values:
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
        normal, _ = reference.rms_norm(x, torch.ones_like(weight), ctx.eps)
        products = grad_y.to(rstd.dtype) * normal
        grad_weight = products.reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    return grad_x, grad_weight, None


autograd("rms_norm", _backward, _setup)
