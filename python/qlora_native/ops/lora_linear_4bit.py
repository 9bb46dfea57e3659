"""lora_linear_4bit: y = x W^T + bias + scale * (x_lora A^T) B^T as one autograd node.

Returns y and xa = x_lora A^T; xa, x, x_lora, A and B are all that backward needs beside the packed weight.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _products
from ._library import Weight, autograd, check_matrix, fake, implement, weight_of
from .linear_4bit import (
    NO_WEIGHT_GRADIENT,
    dense_weight,
    save_weight,
    saved_weight,
    sum_to_bias,
    without_autocast,
)

Pair = tuple[torch.Tensor, torch.Tensor]


def check(
    x: torch.Tensor,
    x_lora: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    weight: Weight,
) -> None:
    """Refuses operands that do not fit each other."""
    check_matrix("lora_linear_4bit", x, weight, bias, features=1)
    n, k = weight.shape
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != k or b.shape[0] != n or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"lora_linear_4bit: weight is [{n}, {k}], a is {list(a.shape)}, b is {list(b.shape)}: "
            f"expected a [r, {k}] and b [{n}, r]."
        )
    if x_lora is not None and (x_lora.shape != x.shape or x_lora.dtype != x.dtype):
        raise ValueError(
            f"lora_linear_4bit: x_lora is {x_lora.dtype} {list(x_lora.shape)}: expected {x.dtype} {list(x.shape)}."
        )


@implement("lora_linear_4bit", "CPU")
def cpu(
    x: torch.Tensor,
    x_lora: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    low_memory: bool,
    *arguments: Any,
) -> Pair:
    weight = weight_of(arguments)
    check(x, x_lora, a, b, bias, weight)
    rows = x.reshape(-1, x.shape[-1])
    adapted = rows if x_lora is None else x_lora.reshape(-1, x.shape[-1])
    with without_autocast(x):
        xa = torch.mm(adapted, a.to(x.dtype).t())
        y = _products.forward(rows, weight, bias, (xa, b.to(x.dtype), scale))
    return y.view(*x.shape[:-1], weight.shape[0]), xa.view(*x.shape[:-1], a.shape[0])


@implement("lora_linear_4bit", "CompositeExplicitAutograd")
def anywhere(
    x: torch.Tensor,
    x_lora: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    low_memory: bool,
    *arguments: Any,
) -> Pair:
    weight = weight_of(arguments)
    check(x, x_lora, a, b, bias, weight)
    with without_autocast(x):
        adapted = x if x_lora is None else x_lora
        xa = adapted @ a.to(x.dtype).t()
        cast_bias = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(x, dense_weight(weight, x.dtype), cast_bias).reshape(-1, weight.shape[0])
        y.addmm_(xa.reshape(-1, a.shape[0]), b.to(x.dtype).t(), alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0]), xa


@fake("lora_linear_4bit")
def shapes(
    x: torch.Tensor,
    x_lora: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    low_memory: bool,
    *arguments: Any,
) -> Pair:
    weight = weight_of(arguments)
    check(x, x_lora, a, b, bias, weight)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], a.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, x_lora, a, b, scale, bias, low_memory, *arguments = inputs
    # x itself is needed only as the adapter's input; with a dropped-out copy in its place it is not kept.
    save_weight(ctx, tuple(arguments), x if x_lora is None else x_lora, a, b, output[1])
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.low_memory = scale, low_memory
    ctx.separate = x_lora is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: torch.Tensor | None, grad_xa: torch.Tensor | None) -> tuple[Any, ...]:
    arguments, (adapted, a, b, xa) = saved_weight(ctx)
    need_x, need_x_lora, need_a, need_b, _, need_bias = ctx.needs_input_grad[:6]
    grad_x = grad_x_lora = grad_a = grad_b = grad_bias = None
    low = grad_xa.reshape(-1, a.shape[0]) if grad_xa is not None else None  # gradient of xa
    if grad_y is not None:
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        through_b = torch.mm(rows, b.to(rows.dtype)) * ctx.scale
        low = through_b if low is None else low + through_b
        if need_b:
            grad_b = (torch.mm(rows.t(), xa.reshape(-1, a.shape[0])) * ctx.scale).to(b.dtype)
        if need_bias:
            grad_bias = sum_to_bias(grad_y, ctx.bias_dtype)
        if need_x:
            grad_x = torch.ops.qlora_native.linear_4bit_grad_input(grad_y, ctx.low_memory, *arguments)
    if low is not None:
        if need_a:
            grad_a = torch.mm(low.t(), adapted.reshape(-1, a.shape[1])).to(a.dtype)
        if need_x_lora if ctx.separate else need_x:
            if grad_x is None or ctx.separate:
                through_a = torch.mm(low, a.to(low.dtype)).view(adapted.shape)
                grad_x, grad_x_lora = (grad_x, through_a) if ctx.separate else (through_a, None)
            elif torch.is_grad_enabled():
                grad_x = grad_x + torch.mm(low, a.to(low.dtype)).view(adapted.shape)
            else:  # nobody differentiates this gradient: add in place, in the GEMM
                grad_x.view(-1, a.shape[1]).addmm_(low, a.to(low.dtype))
    return grad_x, grad_x_lora, grad_a, grad_b, None, grad_bias, None, *NO_WEIGHT_GRADIENT


autograd("lora_linear_4bit", _backward, _setup)
