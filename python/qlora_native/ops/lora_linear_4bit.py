"""lora_linear_4bit: y = x W^T + bias + scale * (x_lora A^T) B^T as one autograd node.

Returns y and x_lora A^T, which with the operands, the weight packed, is all that backward needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._direct import adapted_product, call_in_derivative, is_few
from qlora_native.ops._engine import (
    NO_WEIGHT_GRADIENT,
    Adapter,
    Engine,
    as_rows,
    save_weight,
    saved_weight,
    sum_to_bias,
    without_autocast,
)
from qlora_native.ops._library import autograd, fake, implement
from qlora_native.ops._operands import Weight
from qlora_native.ops.linear_4bit import ANY, CPU, cuda_engine

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, x_lora, A, B; empty if not needed


def forward_by(engine: Engine, arguments: tuple[Any, ...]) -> Pair:
    """The op by the products of an engine."""
    x, x_lora, a, b, scale, bias = arguments[:6]
    weight: Weight = tuple.__new__(Weight, arguments[6:])
    rows, dtype = as_rows(x), x.dtype
    with without_autocast(x):
        down, up = engine.adapter(a, dtype), engine.adapter(b, dtype, scale)
        if x_lora is None and engine.makes_low and dtype in DTYPE_NUMBER:
            xa = x.new_empty(rows.shape[0], a.shape[0])
            adapter = Adapter(xa, up, down)
        else:
            xa = engine.dense_forward(rows if x_lora is None else as_rows(x_lora), down)
            adapter = Adapter(xa, up)
        y = engine.forward(rows, weight, bias, adapter)
    if rows is x:
        return y, xa
    return y.view(*x.shape[:-1], weight.shape[0]), xa.view(*x.shape[:-1], a.shape[0])


@implement("lora_linear_4bit", "CPU")
def cpu(*arguments: Any) -> Pair:
    x, x_lora, a, b, scale, bias = arguments[:6]
    few = None
    if x_lora is None and is_few(x):
        weight = Weight(*arguments[6:])
        n, k = weight.shape
        few = adapted_product((n, k, _C.matrix(n, k, weight.pointers())), x, bias, a, b, scale)
    return forward_by(CPU, arguments) if few is None else few


@fake("lora_linear_4bit")
def shapes(*arguments: Any) -> Pair:
    x, _, a = arguments[:3]
    return x.new_empty(*x.shape[:-1], Weight(*arguments[6:]).shape[0]), x.new_empty(*x.shape[:-1], a.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, x_lora, a, b, scale, bias, *arguments = inputs
    # x itself is needed only as the adapter's input; with a dropped-out copy in its place it is not kept.
    save_weight(ctx, tuple(arguments), x if x_lora is None else x_lora, a, b, output[1])
    ctx.set_materialize_grads(False)
    ctx.options = scale, x_lora is not None, None if bias is None else bias.dtype


@lru_cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def backward_by(engine: Engine, arguments: tuple[Any, ...], grad_xa: Tensor | None = None) -> Gradients:
    """The gradients by the products of an engine."""
    grad_y, x, xa, a, b, scale, separate, needed = arguments[:8]
    weight: Weight = tuple.__new__(Weight, arguments[8:])
    rows, tokens, dtype = as_rows(grad_y), as_rows(x), grad_y.dtype
    need_x, need_x_lora, need_a, need_b = needed
    grad_x = grad_x_lora = grad_a = grad_b = _nothing(x.dtype, x.device)
    with without_autocast(x):
        down = engine.adapter(a, dtype)
        if need_x and not separate and engine.makes_low and dtype in DTYPE_NUMBER:
            low = x.new_empty(rows.shape[0], a.shape[0])
            grad_x = engine.grad_input(rows, weight, Adapter(low, down, engine.adapter(b, dtype), scale))
        else:
            low = engine.grad_low(rows, b, scale)
            if grad_xa is not None:
                low = low + grad_xa.reshape(low.shape)
            if need_x:
                grad_x = engine.grad_input(rows, weight, None if separate else Adapter(low, down))
            if need_x_lora:
                grad_x_lora = engine.dense_grad_input(low, down).view(x.shape)
        if need_x and tokens is not x:
            grad_x = grad_x.view(x.shape)
        if need_a:
            grad_a = engine.outer(low, tokens, 1.0, a.dtype)
        if need_b:
            grad_b = engine.outer(as_rows(xa), rows, scale, b.dtype, transposed=True)
    return grad_x, grad_x_lora, grad_a, grad_b


@implement("lora_linear_4bit_backward", "CPU")
def cpu_backward(*arguments: Any) -> Gradients:
    return backward_by(CPU, arguments)


def _register(device: str, engine_of: Callable[[torch.device], Engine]) -> None:
    """The kernels for another dispatch key."""

    @implement("lora_linear_4bit", device)
    def forward(*arguments: Any) -> Pair:
        return forward_by(engine_of(arguments[0].device), arguments)

    @implement("lora_linear_4bit_backward", device)
    def backward(*arguments: Any) -> Gradients:
        return backward_by(engine_of(arguments[0].device), arguments)


_register("CUDA", lambda device: cuda_engine(device) or ANY)
_register("CompositeExplicitAutograd", lambda _: ANY)


@fake("lora_linear_4bit_backward")
def backward_shapes(*arguments: Any) -> Gradients:
    _, x, _, a, b, _, _, needed = arguments[:8]
    need_x, need_x_lora, need_a, need_b = needed
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(x.shape if need_x_lora else 0),
        a.new_empty(a.shape if need_a else 0),
        b.new_empty(b.shape if need_b else 0),
    )


def _backward(ctx: Any, grad_y: Tensor | None, grad_xa: Tensor | None) -> tuple[Any, ...]:
    arguments, (adapted, a, b, xa) = saved_weight(ctx)
    scale, separate, bias_dtype = ctx.options
    *needed, _, need_bias = ctx.needs_input_grad[:6]
    if grad_y is None:
        grad_y = xa.new_zeros(*xa.shape[:-1], b.shape[0])
    options = (grad_y, adapted, xa, a, b, scale, separate, needed)
    if grad_xa is not None or torch.is_grad_enabled():  # by ops that have derivatives of their own
        grads = backward_by(ANY, (*options, *arguments), grad_xa)
    else:
        grads = call_in_derivative("lora_linear_4bit_backward", *options, *arguments)
    grad_x, grad_x_lora, grad_a, grad_b = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    grad_bias = sum_to_bias(grad_y, bias_dtype) if need_bias else None
    return grad_x, grad_x_lora, grad_a, grad_b, None, grad_bias, *NO_WEIGHT_GRADIENT


autograd("lora_linear_4bit", _backward, _setup)
