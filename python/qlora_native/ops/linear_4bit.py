"""linear_4bit: y = x W^T + bias with a frozen 4-bit weight, and its input gradient, linear_4bit_grad_input: g W.

W [N, K] is decoded inside the products, a tile or a panel at a time, and never dense as a whole on a CPU. A device has
an :class:`Engine`, whose products the ops of the other files share. To change what a CPU computes, begin at
:meth:`Cpu.product`; tokens of which nothing is recorded go by :func:`product` instead. Both end at ``path_of`` in
cpp/cpu/linear_4bit.cc, which chooses among the kernels. For CUDA begin at ``Cuda.product`` in ``_cuda_products``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._buffers import buffer, empty_like, gather_pages, scratch
from qlora_native._native import DTYPE_NUMBER
from qlora_native.errors import say_once
from qlora_native.ops._direct import PLAIN, call, kernel_of
from qlora_native.ops._engine import (
    Adapter,
    Engine,
    address,
    as_rows,
    autocast,
    save_weight,
    saved_weight,
    sum_to_bias,
    unflattened,
    without_autocast,
)
from qlora_native.ops._library import Values, autograd, cuda_kernels, fake, implement
from qlora_native.ops._operands import Weight
from qlora_native.ops.dequantize_4bit import decode_panel

Matrix = tuple[int, int, object]  # N, K, and the native form of a weight [N, K]
_CPU = torch.device("cpu")
PANEL_BYTES = 8 << 20  # of decoded weights at a time, in float64


class Cpu(Engine):
    """The native kernels, and float64 through torch.

    Each native product is called twice where its scratch is too small: it then computes nothing and returns the bytes
    that it needs. Dense operands in fp32 and wider are torch's, whose product is fast on all CPUs.
    """

    makes_low = True

    def product(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        if x.dtype not in DTYPE_NUMBER:
            return super().product(is_forward, x, weight, bias, adapter)
        x = x.contiguous()
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        n, k = weight.shape
        m = x.shape[0]
        y = empty_like(x, (m, n if is_forward else k))
        factors: tuple[int, float, int, int, int] = 0, 1.0, 0, 0, 0
        if adapter is not None:  # contiguous by construction
            low, up, down, down_scale = adapter
            factors = address(down), down_scale, low.data_ptr(), up.data_ptr(), low.shape[1]
        operands = (
            is_forward,
            DTYPE_NUMBER[x.dtype],
            x.data_ptr(),
            address(bias),
            *factors,
            y.data_ptr(),
            m,
            n,
            k,
        )
        pointers = weight.pointers()
        room = buffer(0)
        while needed := _C.linear_4bit(*operands, *room, pointers):
            room = buffer(needed)
        return y

    def plain(self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """In float64, by torch's GEMM, from panels of rows of the weight."""
        n, k = weight.shape
        y = x.new_zeros(x.shape[0], n if is_forward else k)
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
        return y if bias is None else y.add_(bias)

    def outer(
        self, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, transposed: bool = False
    ) -> Tensor:
        if left.dtype not in DTYPE_NUMBER:
            return super().outer(left, right, scale, dtype, transposed)
        left = left.contiguous()
        right = right.contiguous()
        m, rank = left.shape
        width = right.shape[1]
        out = torch.empty(rank, width, dtype=torch.float32)
        operands = (left.data_ptr(), right.data_ptr(), m, rank, width, scale, out.data_ptr())
        room = buffer(0)
        while needed := _C.outer(DTYPE_NUMBER[left.dtype], *operands, *room):
            room = buffer(needed)
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
        return self._dense(is_forward, x, weight, bias, scale, out)

    def low(self, x: Tensor, down: Tensor) -> Tensor:
        return self._dense(True, x, down) if x.dtype in DTYPE_NUMBER else super().low(x, down)

    def _dense(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """By the native kernel, which adds up in the order in which a product makes ``low``."""
        x = x.contiguous()
        weight = weight.contiguous()
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        n, k = weight.shape
        m = x.shape[0]
        y = empty_like(x, (m, n if is_forward else k)) if out is None else out
        operands = (
            is_forward,
            DTYPE_NUMBER[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            address(bias),
            scale,
        )
        room = buffer(0)
        while needed := _C.dense_linear(*operands, y.data_ptr(), m, n, k, *room):
            room = buffer(needed)
        return y


class Decoded(Engine):
    """For devices without kernels: products of the whole dequantized weight."""

    def plain(self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        say_once(
            f"qlora_native: no 4-bit matrix kernel on {weight.packed.device.type} in this build; "
            "dequantizing the whole weight for every product, which is slower and needs its memory."
        )
        stored = torch.float32 if x.dtype == torch.float64 else x.dtype
        return self.dense(is_forward, x, call("dequantize_4bit", stored, weight).to(x.dtype), bias)


CPU = Cpu()
DECODED = Decoded()


def cuda_engine(device: torch.device) -> Engine:
    """The kernels of a CUDA device; none, after a warning, for one on which they cannot run."""
    module = cuda_kernels().native(device)
    return DECODED if module is None else _engine_over(module)


@cache  # as cuda_kernels
def _engine_over(module: ModuleType) -> Engine:
    from qlora_native.ops import _cuda_products

    return _cuda_products.Cuda(module)


# Engines by dispatch key.
ENGINES: dict[str, Callable[[torch.device], Engine]] = {
    "CPU": lambda _: CPU,
    "CUDA": cuda_engine,
    "CompositeExplicitAutograd": lambda _: DECODED,
}


def _register(device: str, engine_of: Callable[[torch.device], Engine]) -> None:
    """The kernels for a dispatch key, by the products of an engine."""

    @implement("linear_4bit", device)
    def forward(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
        with without_autocast(x):
            y = engine_of(x.device).product(True, as_rows(x), weight, bias)
        return unflattened(y, x.shape[:-1])

    @implement("linear_4bit_grad_input", device)
    def grad_input(grad_y: Tensor, weight: Weight) -> Tensor:
        with without_autocast(grad_y):
            grad_x = engine_of(grad_y.device).product(False, as_rows(grad_y), weight)
        return unflattened(grad_x, grad_y.shape[:-1])


for _device, _engine_of in ENGINES.items():
    _register(_device, _engine_of)


def linear_4bit(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The op: at once by a kernel above or the node over it where that makes no difference, else by torch's dispatcher,
    under autocast as torch's own linear layer."""
    kernel = kernel_of("linear_4bit", (x, bias, weight))
    if kernel is None:
        x, bias = autocast(x, bias)  # type: ignore[assignment]
        return torch.ops.qlora_native.linear_4bit(x, bias, *weight)
    return kernel(x, bias, weight)


class Prepared:
    """A weight's native form, made when first used and again when a tensor lies elsewhere; copies get their own."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        # This is replaced as a whole: threads may share an owner.
        self._made: tuple[Any, Matrix | None] = (None, None)

    def __reduce__(self) -> Values:
        return Prepared, ()

    def matrix(self, weight: Values) -> Matrix | None:
        """The native matrix of weight arguments, or None unless they are two-dimensional plain tensors in CPU memory.

        Raises ValueError for tensors that do not fit each other.
        """
        parts = weight[:6]
        numbers = weight[6:]
        if type(parts[0]) not in PLAIN or type(parts[1]) not in PLAIN:
            return None
        key = [t if t is None else (t.data_ptr(), t.numel()) for t in parts]
        key += numbers
        made, matrix = self._made
        if made == key:
            return matrix
        if len(numbers[0]) != 2 or not all(
            t is None or (type(t) in PLAIN and t.device == _CPU) for t in parts
        ):
            return None
        checked = Weight(*weight)
        checked.check()
        n, k = checked.shape
        matrix = (n, k, _C.matrix(n, k, checked.pointers()))
        self._made = key, matrix
        gather_pages(parts[0])
        return matrix


def product(matrix: Matrix | None, x: Tensor, bias: Tensor | None, *adapter: Any) -> Tensor | None:
    """x W^T + bias for operands that are :func:`unobserved`, or None where the kernel cannot take them as they are.

    ``adapter``: what the native function takes last.
    """
    shape = x.shape
    if matrix is None or x.dtype not in DTYPE_NUMBER or not shape or not x.is_contiguous():
        return None
    n, k, native = matrix
    rows = x.numel() // k if n and k and shape[-1] == k else 0
    if not rows or not (
        bias is None or (bias.dtype == x.dtype and bias.shape == (n,) and bias.is_contiguous())
    ):
        return None
    y = torch.empty((*shape[:-1], n), dtype=x.dtype, device=_CPU)
    addend = 0 if bias is None else bias.data_ptr()
    arguments = (native, DTYPE_NUMBER[x.dtype], x.data_ptr(), addend, y.data_ptr(), rows)
    room = buffer(0)
    while needed := _C.matrix_forward(*arguments, *room, *adapter):
        room = buffer(needed)
    return y


@fake("linear_4bit")
def shapes(x: Tensor, bias: Tensor | None, weight: Weight) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@fake("linear_4bit_grad_input")
def grad_input_shapes(grad_y: Tensor, weight: Weight) -> Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])


# y = x W^T + bias, so grad_x = grad_y W, and grad_bias sums grad_y over the tokens; W is frozen. grad_x = grad_y W in
# turn is linear in grad_y, with the gradient (d / d grad_x) W^T.


def _setup(ctx: Any, inputs: Values, output: Tensor) -> None:
    save_weight(ctx, inputs[-1])


def _backward(ctx: Any, grad_y: Tensor) -> Values:
    weight, _ = saved_weight(ctx)
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    grad_x = call("linear_4bit_grad_input", grad_y, weight) if needs_x else None
    return grad_x, sum_to_bias(grad_y) if needs_bias else None


def _backward_grad_input(ctx: Any, grad_grad_x: Tensor) -> Values:
    weight, _ = saved_weight(ctx)
    return (call("linear_4bit", grad_grad_x, None, weight),)


autograd("linear_4bit", _backward, _setup, before=lambda *inputs: ())
autograd("linear_4bit_grad_input", _backward_grad_input, _setup)
