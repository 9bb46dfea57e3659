"""lora_linear_4bit: y = x W^T + bias + s * (x_lora A^T) B^T as one autograd node, W [N, K] frozen in 4 bits.

x_lora is x where it is None. The op returns y and xa = x_lora A^T [M, r]: with the operands, the weight packed, that is
all that backward needs. With g = dL/dy and low = s * g B, which is [M, r],

    dL/dx = g W + low A        dL/dx_lora = low A, apart, where x_lora was given
    dL/dA = low^T x_lora       dL/dB = s * g^T xa        dL/dbias = sum of g over the tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._direct import call_in_derivative, is_compiling, is_plain, kernel_of, unobserved
from qlora_native.ops._engine import (
    ANY,
    Adapter,
    Engine,
    as_rows,
    autocast,
    save_weight,
    saved_weight,
    sum_to_bias,
    unflattened,
    without_autocast,
)
from qlora_native.ops._library import Function, Values, autograd, fake, implement
from qlora_native.ops._operands import Weight
from qlora_native.ops.linear_4bit import CPU, ENGINES, Matrix, product

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, x_lora, A, B; empty if not needed


def is_few(x: Tensor) -> bool:
    """Whether few_rows() of the kernels covers x [..., K], a few tokens in one of their dtypes."""
    number = DTYPE_NUMBER.get(x.dtype)
    return number is not None and x.dim() > 0 and 0 < x.numel() <= _C.few_rows(number) * x.shape[-1]


def adapted_product(
    matrix: Matrix | None, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """x W^T + bias + scale * low B^T and low = x A^T for x that :func:`is_few`, or None where operands do not fit.

    A [r, K] and B [N, r] are multiplied as they are stored, in fp32; low [..., r] is in x's dtype.
    """
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if matrix is None or a.dim() != 2:
        return None
    n, k, _ = matrix
    rank = a.shape[0]
    if not rank or a.shape[1] != k or b.shape != (n, rank):
        return None
    a = a.float().contiguous()
    b = b.float().contiguous()
    low = torch.empty((*x.shape[:-1], rank), dtype=x.dtype, device=x.device)
    y = product(matrix, x, bias, a.data_ptr(), b.data_ptr(), scale, low.data_ptr(), rank)
    return None if y is None else (y, low)


def adapted_at_once(
    matrix: Callable[[], Matrix | None],
    x: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor | None:
    """The first result of :func:`adapted_product` past the dispatcher, or None where that is not possible."""
    if (
        (a.requires_grad and torch.is_grad_enabled())
        or is_compiling()
        or not is_plain(x)
        or not is_few(x)
        or not unobserved(x, a, b, bias)
    ):
        return None
    made = adapted_product(matrix(), x, bias, a, b, scale)
    return None if made is None else made[0]


def forward_by(
    engine: Engine,
    x: Tensor,
    x_lora: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    weight: Weight,
    known_xa: Tensor | None = None,
) -> Pair:
    """y and xa by the products of an engine."""
    if engine is CPU and x_lora is None and is_few(x):  # in one pass over W
        n, k = weight.shape
        few = adapted_product((n, k, _C.matrix(n, k, weight.pointers())), x, bias, a, b, scale)
        if few is not None:
            return few
    rows = as_rows(x)
    dtype = x.dtype
    with without_autocast(x):
        down = engine.adapter(a, dtype)
        up = engine.adapter(b, dtype, scale)
        if known_xa is not None:
            xa = as_rows(known_xa)
            adapter = Adapter(xa, up)
        elif x_lora is None and engine.makes_low and dtype in DTYPE_NUMBER:
            xa = x.new_empty(rows.shape[0], a.shape[0])
            adapter = Adapter(xa, up, down)  # the product fills xa
        else:
            xa = engine.dense(True, rows if x_lora is None else as_rows(x_lora), down)
            adapter = Adapter(xa, up)
        y = engine.product(True, rows, weight, bias, adapter)
    if rows is x:
        return y, xa
    leading = x.shape[:-1]
    return unflattened(y, leading), unflattened(xa, leading)


def backward_by(
    engine: Engine,
    grad_y: Tensor,
    x: Tensor,
    xa: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    separate: bool,
    needed: Sequence[bool],
    weight: Weight,
    grad_xa: Tensor | None = None,
) -> Gradients:
    """Those of x, x_lora, A and B that are ``needed``. ``x`` is what the adapter saw; ``separate``: that was x_lora."""
    rows = as_rows(grad_y)
    tokens = as_rows(x)
    dtype = grad_y.dtype
    need_x, need_x_lora, need_a, need_b = needed
    grad_x = grad_x_lora = grad_a = grad_b = _nothing(x.dtype, x.device)
    with without_autocast(x):
        down = engine.adapter(a, dtype)
        if need_x and not separate and engine.makes_low and dtype in DTYPE_NUMBER:
            low = x.new_empty(rows.shape[0], a.shape[0])
            adapter = Adapter(low, down, engine.adapter(b, dtype), scale)  # the product fills low
            grad_x = engine.product(False, rows, weight, None, adapter)
        else:
            low = engine.grad_low(rows, b, scale)
            if grad_xa is not None:
                low = low + grad_xa.reshape(low.shape)
            if need_x:
                grad_x = engine.product(
                    False, rows, weight, None, None if separate else Adapter(low, down)
                )
            if need_x_lora:
                grad_x_lora = engine.dense(False, low, down).view(x.shape)
        if need_x and tokens is not x:
            grad_x = grad_x.view(x.shape)
        if need_a:
            grad_a = engine.outer(low, tokens, 1.0, a.dtype)
        if need_b:
            grad_b = engine.outer(as_rows(xa), rows, scale, b.dtype, transposed=True)
    return grad_x, grad_x_lora, grad_a, grad_b


@lru_cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


# No function of our own between the node and the products, as a small layer's host would notice.
implement("lora_linear_4bit", "CPU")(partial(forward_by, CPU))
implement("lora_linear_4bit_backward", "CPU")(partial(backward_by, CPU))


def _by_device(
    engine_of: Callable[[torch.device], Engine], function: Function, first: Tensor, *others: Any
) -> Any:
    return function(engine_of(first.device), first, *others)


for _device in ("CUDA", "CompositeExplicitAutograd"):
    implement("lora_linear_4bit", _device)(partial(_by_device, ENGINES[_device], forward_by))
    implement("lora_linear_4bit_backward", _device)(partial(_by_device, ENGINES[_device], backward_by))


def lora_linear_4bit(
    x: Tensor,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    x_lora: Tensor | None = None,
) -> Tensor:
    """The op's y: at once by the kernel or the node over it where that makes no difference, else by torch's dispatcher,
    under autocast as torch's own linear layer."""
    kernel = kernel_of("lora_linear_4bit", (x, x_lora, a, b, scale, bias, weight))
    if kernel is None:
        x, bias, x_lora = autocast(x, bias, x_lora)  # type: ignore[assignment]
        return torch.ops.qlora_native.lora_linear_4bit(x, x_lora, a, b, scale, bias, *weight)[0]
    return kernel(x, x_lora, a, b, scale, bias, weight)[0]


@fake("lora_linear_4bit")
def shapes(x: Tensor, x_lora: Tensor | None, a: Tensor, b: Tensor, *others: Any) -> Pair:
    leading = x.shape[:-1]
    return x.new_empty(*leading, b.shape[0]), x.new_empty(*leading, a.shape[0])


@fake("lora_linear_4bit_backward")
def backward_shapes(
    grad_y: Tensor,
    x: Tensor,
    xa: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    separate: bool,
    *others: Any,
) -> Values:
    needed, _ = others
    return tuple(
        t.new_empty(t.shape if need else 0) for t, need in zip((x, x, a, b), needed, strict=True)
    )


def _setup(ctx: Any, inputs: Values, output: Pair) -> None:
    x, x_lora, a, b, scale, _, weight = inputs
    # x itself is needed only as the adapter's input; with a dropped-out copy in its place it is not kept.
    save_weight(ctx, weight, x if x_lora is None else x_lora, a, b, output[1])
    ctx.set_materialize_grads(False)
    ctx.options = scale, x_lora is not None


def _backward(ctx: Any, grad_y: Tensor | None, grad_xa: Tensor | None) -> Values:
    weight, (seen, a, b, xa) = saved_weight(ctx)
    need_x, need_x_lora, need_a, need_b, _, need_bias, *_ = ctx.needs_input_grad
    needed = need_x, need_x_lora, need_a, need_b
    if grad_y is None:
        grad_y = xa.new_zeros(*xa.shape[:-1], b.shape[0])
    scale, separate = ctx.options
    arguments = (grad_y, seen, xa, a, b, scale, separate, needed, weight)
    if grad_xa is not None or torch.is_grad_enabled():  # by ops that have derivatives of their own
        grads = backward_by(ANY, *arguments, grad_xa)
    else:
        grads = call_in_derivative("lora_linear_4bit_backward", *arguments)
    found = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return *found, None, sum_to_bias(grad_y) if need_bias else None


def _xa(
    x: Tensor,
    x_lora: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    weight: Weight,
) -> tuple[Tensor]:
    """What backward needs of the outputs, xa as forward makes it; without the product, but for a few tokens."""
    engine = ENGINES["CPU" if x.device.type == "cpu" else "CUDA"](x.device)
    if engine is CPU and x_lora is None and is_few(x):
        return forward_by(engine, x, None, a, b, scale, bias, weight)[1:]
    with without_autocast(x):
        down = engine.adapter(a, x.dtype)
        xa = (
            engine.low(as_rows(x), down)
            if x_lora is None
            else engine.dense(True, as_rows(x_lora), down)
        )
    return (xa.view(*x.shape[:-1], a.shape[0]),)


autograd("lora_linear_4bit", _backward, _setup, before=_xa)
