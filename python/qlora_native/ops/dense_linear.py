"""dense_linear: x W^T + bias with a dense weight in 16 bits, and the gradients.

grad_x = grad_y W, grad_W = grad_y^T x, and grad_bias sums grad_y over the tokens; the gradients are ops themselves, so
that they can be differentiated in turn. torch's own 16-bit product is a plain loop on CPUs without bf16 instructions.
Other dtypes and devices go to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native.ops._direct import call
from qlora_native.ops._engine import ANY, Engine, as_rows, sum_to_bias, without_autocast
from qlora_native.ops._library import Values, autograd, fake, implement, save_inputs
from qlora_native.ops.linear_4bit import CPU


def _register(device: str, engine: Engine) -> None:
    """The kernels for a dispatch key, by the products of an engine."""

    @implement("dense_linear", device)
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with without_autocast(x):
            y = engine.dense(True, as_rows(x), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @implement("dense_linear_grad_input", device)
    def grad_input(grad_y: Tensor, weight: Tensor) -> Tensor:
        with without_autocast(grad_y):
            grad_x = engine.dense(False, as_rows(grad_y), weight)
        return grad_x.view(*grad_y.shape[:-1], weight.shape[1])

    @implement("dense_linear_grad_weight", device)
    def grad_weight(grad_y: Tensor, x: Tensor) -> Tensor:
        with without_autocast(x):
            return engine.outer(as_rows(grad_y), as_rows(x), 1.0, x.dtype)


_register("CPU", CPU)
_register("CompositeExplicitAutograd", ANY)


@fake("dense_linear")
def shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@fake("dense_linear_grad_input")
def grad_input_shapes(grad_y: Tensor, weight: Tensor) -> Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])


@fake("dense_linear_grad_weight")
def grad_weight_shapes(grad_y: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad_y.shape[-1], x.shape[-1])


def _setup(ctx: Any, inputs: Values, output: Tensor) -> None:
    x, weight, bias = inputs
    needs_x = ctx.needs_input_grad[1]  # for the weight's gradient; a frozen weight does not keep it
    ctx.save_for_backward(x if needs_x else None, weight if ctx.needs_input_grad[0] else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> Values:
    (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
    grad_x = call("dense_linear_grad_input", grad_y, weight) if needs_x else None
    grad_weight = call("dense_linear_grad_weight", grad_y, x) if needs_weight else None
    return grad_x, grad_weight, sum_to_bias(grad_y, ctx.bias_dtype) if needs_bias else None


def _backward_grad_input(ctx: Any, grad: Tensor) -> Values:
    (grad_y, weight), (needs_grad_y, needs_weight) = ctx.saved_tensors, ctx.needs_input_grad
    by_grad_y = torch.ops.qlora_native.dense_linear(grad, weight, None) if needs_grad_y else None
    return by_grad_y, call("dense_linear_grad_weight", grad_y, grad) if needs_weight else None


def _backward_grad_weight(ctx: Any, grad: Tensor) -> Values:
    (grad_y, x), (needs_grad_y, needs_x) = ctx.saved_tensors, ctx.needs_input_grad
    by_grad_y = torch.ops.qlora_native.dense_linear(x, grad, None) if needs_grad_y else None
    return by_grad_y, call("dense_linear_grad_input", grad_y, grad) if needs_x else None


autograd("dense_linear", _backward, _setup)
autograd("dense_linear_grad_input", _backward_grad_input, save_inputs)
autograd("dense_linear_grad_weight", _backward_grad_weight, save_inputs)
