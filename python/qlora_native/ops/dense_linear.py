"""dense_linear: x W^T + bias with a dense weight in 16 bits, and the gradients.

grad_x = grad_y W, grad_W = grad_y^T x, and grad_bias sums grad_y over the tokens; the gradients are ops themselves, so
that they can be differentiated in turn. torch's own 16-bit product is a plain loop on CPUs without bf16 instructions.
Other dtypes and devices go to torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from qlora_native.ops._direct import call
from qlora_native.ops._engine import ANY, Engine, as_rows, sum_to_bias, unflattened, without_autocast
from qlora_native.ops._library import Values, autograd, fake, implement, save_inputs
from qlora_native.ops.linear_4bit import CPU, grad_input_shapes


def _product(
    engine: Engine, is_forward: bool, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias for x [..., K], or x W for x [..., N]."""
    with without_autocast(x):
        y = engine.dense(is_forward, as_rows(x), weight, bias)
    return unflattened(y, x.shape[:-1])


def _grad_weight(engine: Engine, grad_y: Tensor, x: Tensor) -> Tensor:
    with without_autocast(x):
        return engine.outer(as_rows(grad_y), as_rows(x), 1.0, x.dtype)


for _device, _engine in (("CPU", CPU), ("CompositeExplicitAutograd", ANY)):
    implement("dense_linear", _device)(partial(_product, _engine, True))
    implement("dense_linear_grad_input", _device)(partial(_product, _engine, False))
    implement("dense_linear_grad_weight", _device)(partial(_grad_weight, _engine))


@fake("dense_linear")
def shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


fake("dense_linear_grad_input")(grad_input_shapes)


@fake("dense_linear_grad_weight")
def grad_weight_shapes(grad_y: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad_y.shape[-1], x.shape[-1])


def _setup(ctx: Any, inputs: Values, output: Tensor) -> None:
    x, weight, _ = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    # Each for the gradient of the other: a frozen weight does not keep x.
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _backward(ctx: Any, grad_y: Tensor) -> Values:
    (x, weight), (needs_x, needs_weight, needs_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
    grad_x = call("dense_linear_grad_input", grad_y, weight) if needs_x else None
    grad_weight = call("dense_linear_grad_weight", grad_y, x) if needs_weight else None
    return grad_x, grad_weight, sum_to_bias(grad_y) if needs_bias else None


def _backward_grad_input(ctx: Any, grad: Tensor) -> Values:
    (grad_y, weight), (needs_grad_y, needs_weight, *_) = ctx.saved_tensors, ctx.needs_input_grad
    by_grad_y = call("dense_linear", grad, weight, None) if needs_grad_y else None
    return by_grad_y, call("dense_linear_grad_weight", grad_y, grad) if needs_weight else None


def _backward_grad_weight(ctx: Any, grad: Tensor) -> Values:
    (grad_y, x), (needs_grad_y, needs_x, *_) = ctx.saved_tensors, ctx.needs_input_grad
    by_grad_y = call("dense_linear", x, grad, None) if needs_grad_y else None
    return by_grad_y, call("dense_linear_grad_input", grad_y, grad) if needs_x else None


autograd("dense_linear", _backward, _setup)
autograd("dense_linear_grad_input", _backward_grad_input, save_inputs)
autograd("dense_linear_grad_weight", _backward_grad_weight, save_inputs)
