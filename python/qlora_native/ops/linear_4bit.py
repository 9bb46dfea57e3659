"""linear_4bit: x W^T + bias with a quantized weight, and the gradient of its input, by an :class:`Engine` a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import buffer, empty_like, scratch
from qlora_native.errors import say_once
from qlora_native.ops._direct import call
from qlora_native.ops._engine import (
    NO_WEIGHT_GRADIENT,
    Adapter,
    Engine,
    address,
    as_rows,
    save_weight,
    saved_weight,
    sum_to_bias,
    without_autocast,
)
from qlora_native.ops._library import autograd, cuda_kernels, fake, implement
from qlora_native.ops._operands import Weight
from qlora_native.ops.dequantize_4bit import decode_panel

PANEL_BYTES = 8 << 20  # of decoded weights at a time, in float64


def _with_scratch(run: Callable[..., int]) -> None:
    """Call a native function that returns how many bytes of scratch it needs, if it has too few, with enough."""
    if needed := run(*buffer(0)):
        run(*buffer(needed))


class Cpu(Engine):
    """The native kernels, and float64 through torch.

    A weight is never dense as a whole. Dense operands in fp32 and wider are torch's, whose product is fast on all CPUs.
    """

    makes_low = True

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None = None) -> Tensor:
        return (_native if x.dtype in DTYPE_NUMBER else _in_double)(True, x, weight, bias, adapter)

    def grad_input(self, grad_y: Tensor, weight: Weight, adapter: Adapter | None = None) -> Tensor:
        return (_native if grad_y.dtype in DTYPE_NUMBER else _in_double)(False, grad_y, weight, None, adapter)

    def outer(self, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        if left.dtype not in DTYPE_NUMBER:
            out = torch.mm(left.t(), right) * scale
        else:
            left, right = left.contiguous(), right.contiguous()
            rank, width = left.shape[1], right.shape[1]
            out = torch.empty(rank, width, dtype=torch.float32)
            sizes = (left.shape[0], rank, width, scale, out.data_ptr())
            _with_scratch(partial(_C.outer, DTYPE_NUMBER[left.dtype], left.data_ptr(), right.data_ptr(), *sizes))
        return (out.t() if transposed else out).to(dtype).contiguous()

    def dense_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if x.dtype.itemsize > 2:
            return super().dense_forward(x, weight, bias, out)
        return _dense(True, x, weight, bias, 1.0, out)

    def dense_grad_input(self, grad_y: Tensor, weight: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        if grad_y.dtype.itemsize > 2:
            return super().dense_grad_input(grad_y, weight, scale, out)
        return _dense(False, grad_y, weight, None, scale, out)


ANY, CPU = Engine(), Cpu()


def _native(is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    rows, columns = weight.shape
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    y = empty_like(x, (x.shape[0], rows if is_forward else columns))
    low = up = down = rank = 0
    down_scale = 1.0
    if adapter is not None:  # contiguous by construction
        low, up, down = adapter.low.data_ptr(), adapter.up.data_ptr(), address(adapter.down)
        rank, down_scale = adapter.low.shape[1], adapter.down_scale
    sources = (is_forward, DTYPE_NUMBER[x.dtype], x.data_ptr(), address(bias))
    arguments = (*sources, down, down_scale, low, up, rank, y.data_ptr(), x.shape[0], rows, columns)
    pointers = weight.pointers()
    _with_scratch(lambda address, size: _C.linear_4bit(*arguments, address, size, pointers))
    return y


def _in_double(is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """The same by torch's GEMM, from panels of rows of the weight."""
    rows, columns = weight.shape
    y = torch.zeros(x.shape[0], rows if is_forward else columns, dtype=x.dtype)
    pointers = weight.pointers()
    height = max(1, PANEL_BYTES // (8 * max(1, columns)))
    for first in range(0, rows, height):
        last = min(first + height, rows)
        panel = scratch((last - first) * columns, torch.float32).view(last - first, columns)
        decode_panel(pointers, columns, (first, last), (0, columns), panel)
        if is_forward:
            torch.mm(x, panel.double().t(), out=y[:, first:last])
        else:
            y.addmm_(x[:, first:last], panel.double())
    if bias is not None:
        y += bias.to(y.dtype)
    if adapter is not None:
        y.addmm_(adapter.low, adapter.up.t() if is_forward else adapter.up)
    return y


def _dense(
    is_forward: bool, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor | None
) -> Tensor:
    rows, columns = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    y = empty_like(x, (x.shape[0], rows if is_forward else columns)) if out is None else out
    pointers = (x.data_ptr(), weight.data_ptr(), address(bias), scale, y.data_ptr())
    _with_scratch(partial(_C.dense_linear, is_forward, DTYPE_NUMBER[x.dtype], *pointers, x.shape[0], rows, columns))
    return y


def cuda_engine(device: torch.device) -> Engine | None:
    """The kernels of a CUDA device; None, after a warning, for one on which they cannot run."""
    module = cuda_kernels().native(device)
    if module is None:
        return None
    from qlora_native.ops import _cuda_products

    return _cuda_products.engine(module)


def _dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dequantized weight, for devices without kernels."""
    say_once(
        f"qlora_native: no 4-bit matrix kernel on {weight.packed.device.type} in this build; "
        "dequantizing the whole weight for every product, which is slower and needs its memory."
    )
    stored = torch.float32 if dtype == torch.float64 else dtype
    return torch.ops.qlora_native.dequantize_4bit(stored, *weight).to(dtype)


def _register(device: str, engine_of: Callable[[torch.device], Engine | None]) -> None:
    """The kernels for a dispatch key, by the products of an engine; without one, of the dense weight."""

    @implement("linear_4bit", device)
    def forward(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        weight, engine = Weight(*arguments), engine_of(x.device)
        with without_autocast(x):
            if engine is None:
                cast_bias = None if bias is None else bias.to(x.dtype)
                return torch.nn.functional.linear(x, _dense_weight(weight, x.dtype), cast_bias)
            y = engine.forward(as_rows(x), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @implement("linear_4bit_grad_input", device)
    def grad_input(grad_y: Tensor, *arguments: Any) -> Tensor:
        weight, engine = Weight(*arguments), engine_of(grad_y.device)
        with without_autocast(grad_y):
            if engine is None:
                return grad_y @ _dense_weight(weight, grad_y.dtype)
            grad_x = engine.grad_input(as_rows(grad_y), weight)
        return grad_x.view(*grad_y.shape[:-1], weight.shape[1])


_register("CPU", lambda *_: CPU)
_register("CUDA", cuda_engine)
_register("CompositeExplicitAutograd", lambda *_: None)


@fake("linear_4bit")
def shapes(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    weight = Weight(*arguments)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@fake("linear_4bit_grad_input")
def grad_input_shapes(grad_y: Tensor, *arguments: Any) -> Tensor:
    weight = Weight(*arguments)
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *arguments = inputs
    save_weight(ctx, tuple(arguments))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    (arguments, _), (needs_x, needs_bias, *_) = saved_weight(ctx), ctx.needs_input_grad
    grad_x = call("linear_4bit_grad_input", grad_y, *arguments) if needs_x else None
    return grad_x, sum_to_bias(grad_y, ctx.bias_dtype) if needs_bias else None, *NO_WEIGHT_GRADIENT


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *arguments = inputs
    save_weight(ctx, tuple(arguments))


def _backward_grad_input(ctx: Any, grad_grad_x: Tensor) -> tuple[Any, ...]:
    arguments, _ = saved_weight(ctx)
    return torch.ops.qlora_native.linear_4bit(grad_grad_x, None, *arguments), *NO_WEIGHT_GRADIENT


autograd("linear_4bit", _backward, _setup)
autograd("linear_4bit_grad_input", _backward_grad_input, _setup_grad_input)
