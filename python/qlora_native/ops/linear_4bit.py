"""linear_4bit: y = x W^T + bias with a frozen 4-bit weight, and its input gradient, linear_4bit_grad_input: g W.

W [N, K] is decoded inside the products, a tile or a panel at a time, and never dense as a whole on a CPU. A device has
an :class:`Engine`, whose products the ops of the other files share. To change what a CPU computes, begin at
:meth:`Cpu.product`; for CUDA at ``Cuda.product`` in ``_cuda_products``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import buffer, empty_like, scratch
from qlora_native.errors import say_once
from qlora_native.ops._direct import adapted_product, call, is_few
from qlora_native.ops._engine import (
    Adapter,
    Engine,
    address,
    as_rows,
    save_weight,
    saved_weight,
    sum_to_bias,
    without_autocast,
)
from qlora_native.ops._library import Values, autograd, cuda_kernels, fake, implement
from qlora_native.ops._operands import Weight
from qlora_native.ops.dequantize_4bit import decode_panel

PANEL_BYTES = 8 << 20  # of decoded weights at a time, in float64


class Cpu(Engine):
    """The native kernels, and float64 through torch.

    Each native product is called twice where its scratch is too small: it then computes nothing and returns the bytes
    that it needs. Dense operands in fp32 and wider are torch's, whose product is fast on all CPUs.
    """

    makes_low = True

    def product(
        self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None = None, adapter: Adapter | None = None
    ) -> Tensor:
        if x.dtype not in DTYPE_NUMBER:
            return _in_double(is_forward, x, weight, bias, adapter)
        x = x.contiguous()
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        n, k = weight.shape
        m = x.shape[0]
        y = empty_like(x, (m, n if is_forward else k))
        low = up = down = rank = 0
        down_scale = 1.0
        if adapter is not None:  # contiguous by construction
            low = adapter.low.data_ptr()
            up = adapter.up.data_ptr()
            down = address(adapter.down)
            rank = adapter.low.shape[1]
            down_scale = adapter.down_scale
        operands = (is_forward, DTYPE_NUMBER[x.dtype], x.data_ptr(), address(bias), down, down_scale, low, up, rank)
        sizes = (y.data_ptr(), m, n, k)
        pointers = weight.pointers()
        needed = _C.linear_4bit(*operands, *sizes, *buffer(0), pointers)
        if needed:
            _C.linear_4bit(*operands, *sizes, *buffer(needed), pointers)
        return y

    def few_tokens(
        self, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> tuple[Tensor, Tensor] | None:
        if not is_few(x):
            return None
        n, k = weight.shape
        return adapted_product((n, k, _C.matrix(n, k, weight.pointers())), x, bias, a, b, scale)

    def outer(self, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        if left.dtype not in DTYPE_NUMBER:
            out = torch.mm(left.t(), right) * scale
        else:
            left = left.contiguous()
            right = right.contiguous()
            rank = left.shape[1]
            width = right.shape[1]
            out = torch.empty(rank, width, dtype=torch.float32)
            operands = (DTYPE_NUMBER[left.dtype], left.data_ptr(), right.data_ptr())
            sizes = (left.shape[0], rank, width)
            needed = _C.outer(*operands, *sizes, scale, out.data_ptr(), *buffer(0))
            if needed:
                _C.outer(*operands, *sizes, scale, out.data_ptr(), *buffer(needed))
        return (out.t() if transposed else out).to(dtype).contiguous()

    def dense(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        if x.dtype.itemsize > 2:
            return super().dense(is_forward, x, weight, bias, scale, out)
        x = x.contiguous()
        weight = weight.contiguous()
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        n, k = weight.shape
        m = x.shape[0]
        y = empty_like(x, (m, n if is_forward else k)) if out is None else out
        operands = (is_forward, DTYPE_NUMBER[x.dtype], x.data_ptr(), weight.data_ptr(), address(bias), scale)
        sizes = (y.data_ptr(), m, n, k)
        needed = _C.dense_linear(*operands, *sizes, *buffer(0))
        if needed:
            _C.dense_linear(*operands, *sizes, *buffer(needed))
        return y


CPU = Cpu()


def _in_double(is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """The same by torch's GEMM, from panels of rows of the weight."""
    n, k = weight.shape
    y = torch.zeros(x.shape[0], n if is_forward else k, dtype=x.dtype)
    pointers = weight.pointers()
    height = max(1, PANEL_BYTES // (8 * max(1, k)))
    for first in range(0, n, height):
        last = min(first + height, n)
        panel = scratch((last - first) * k, torch.float32).view(last - first, k)
        decode_panel(pointers, k, (first, last), (0, k), panel)
        if is_forward:
            torch.mm(x, panel.double().t(), out=y[:, first:last])
        else:
            y.addmm_(x[:, first:last], panel.double())
    if bias is not None:
        y += bias.to(y.dtype)
    if adapter is not None:
        y.addmm_(adapter.low, adapter.up.t() if is_forward else adapter.up)
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
    def forward(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
        engine = engine_of(x.device)
        with without_autocast(x):
            if engine is None:
                cast_bias = None if bias is None else bias.to(x.dtype)
                return torch.nn.functional.linear(x, _dense_weight(weight, x.dtype), cast_bias)
            y = engine.product(True, as_rows(x), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @implement("linear_4bit_grad_input", device)
    def grad_input(grad_y: Tensor, weight: Weight) -> Tensor:
        engine = engine_of(grad_y.device)
        with without_autocast(grad_y):
            if engine is None:
                return grad_y @ _dense_weight(weight, grad_y.dtype)
            grad_x = engine.product(False, as_rows(grad_y), weight)
        return grad_x.view(*grad_y.shape[:-1], weight.shape[1])


_register("CPU", lambda _: CPU)
_register("CUDA", cuda_engine)
_register("CompositeExplicitAutograd", lambda _: None)


@fake("linear_4bit")
def shapes(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@fake("linear_4bit_grad_input")
def grad_input_shapes(grad_y: Tensor, weight: Weight) -> Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])


# y = x W^T + bias, so grad_x = grad_y W, and grad_bias sums grad_y over the tokens; W is frozen.


def _setup(ctx: Any, inputs: Values, output: Tensor) -> None:
    _, bias, weight = inputs
    save_weight(ctx, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: Tensor) -> Values:
    weight, _ = saved_weight(ctx)
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    grad_x = call("linear_4bit_grad_input", grad_y, weight) if needs_x else None
    return grad_x, sum_to_bias(grad_y, ctx.bias_dtype) if needs_bias else None


# grad_x = grad_y W in turn is linear in grad_y, with the gradient (d / d grad_x) W^T.


def _setup_grad_input(ctx: Any, inputs: Values, output: Tensor) -> None:
    _, weight = inputs
    save_weight(ctx, weight)


def _backward_grad_input(ctx: Any, grad_grad_x: Tensor) -> Values:
    weight, _ = saved_weight(ctx)
    return (torch.ops.qlora_native.linear_4bit(grad_grad_x, None, *weight),)


autograd("linear_4bit", _backward, _setup)
autograd("linear_4bit_grad_input", _backward_grad_input, _setup_grad_input)
