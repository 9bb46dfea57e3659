"""Products with a quantized CPU weight: the native kernels, and float64 through torch.

Whatever the path, a weight is decoded a little at a time and multiplied at once; it is never dense as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from qlora_native import _C
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import Weight, buffer, scratch
from qlora_native.ops.dequantize_4bit import decode_panel

PANEL_BYTES = 8 << 20  # of decoded weights at a time, in float64
MAKES_LOW = True  # an adapter may carry ``down``


class Adapter(NamedTuple):
    """What a low-rank adapter adds to a product, ``low @ up`` in the product's own sums.

    ``low`` is [M, r]; ``up`` is [N, r] (used transposed) for a forward product and [r, K] for an input gradient. With
    ``down`` ([r, K], or [N, r] for the gradient) the product fills ``low`` itself: ``down_scale`` times x down^T or x
    down.
    """

    low: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor | None = None
    down_scale: float = 1.0


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native(
    is_forward: bool, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapter: Adapter | None
) -> torch.Tensor:
    rows, columns = weight.shape
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    y = torch.empty(x.shape[0], rows if is_forward else columns, dtype=x.dtype)
    low = up = down = rank = 0
    down_scale = 1.0
    if adapter is not None:  # contiguous by construction
        low, up, down = adapter.low.data_ptr(), adapter.up.data_ptr(), _address(adapter.down)
        rank, down_scale = adapter.low.shape[1], adapter.down_scale
    number, addend = DTYPE_NUMBER[x.dtype], _address(bias)
    arguments = (is_forward, number, x.data_ptr(), addend, down, down_scale, low, up, rank, y.data_ptr())
    pointers = weight.pointers()
    sizes = (x.shape[0], rows, columns)
    _with_scratch(lambda *scratch: _C.linear_4bit(*arguments, *sizes, *scratch, *pointers))
    return y


def _with_scratch(call: Callable[..., int]) -> None:
    """Calls a native function that answers how many bytes of scratch it needs, if it has too few, with enough."""
    needed = call(*buffer(0))
    if needed:
        call(*buffer(needed))


def _in_double(
    is_forward: bool, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapter: Adapter | None
) -> torch.Tensor:
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


def forward(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, adapter: Adapter | None = None) -> torch.Tensor:
    """x W^T + bias + low up^T for x [M, K]. Returns [M, N] in x's dtype."""
    return (_native if x.dtype in DTYPE_NUMBER else _in_double)(True, x, weight, bias, adapter)


def grad_input(grad_y: torch.Tensor, weight: Weight, adapter: Adapter | None = None) -> torch.Tensor:
    """grad_y W + low up for grad_y [M, N]. Returns [M, K] in grad_y's dtype."""
    return (_native if grad_y.dtype in DTYPE_NUMBER else _in_double)(False, grad_y, weight, None, adapter)


def outer(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left^T right in fp32 or wider, for left [M, r] and right [M, C]. Returns [r, C]."""
    if left.dtype not in DTYPE_NUMBER:
        return torch.mm(left.t(), right) * scale
    left, right = left.contiguous(), right.contiguous()
    rank, width = left.shape[1], right.shape[1]
    out = torch.empty(rank, width, dtype=torch.float32)
    sizes = (left.shape[0], rank, width, scale, out.data_ptr())
    _with_scratch(partial(_C.outer, DTYPE_NUMBER[left.dtype], left.data_ptr(), right.data_ptr(), *sizes))
    return out


def _dense(
    is_forward: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    rows, columns = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    y = torch.empty(x.shape[0], rows if is_forward else columns, dtype=x.dtype) if out is None else out
    pointers = (x.data_ptr(), weight.data_ptr(), _address(bias), scale, y.data_ptr())
    _with_scratch(partial(_C.dense_linear, is_forward, DTYPE_NUMBER[x.dtype], *pointers, x.shape[0], rows, columns))
    return y


def dense_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias for x [M, K] and a dense W [N, K] of its dtype, summed in fp32. Returns [M, N], in ``out`` if that
    is given (contiguous, without a bias).

    fp32 and wider is torch's: its product is a tuned one on every CPU.
    """
    if x.dtype.itemsize > 2:
        if bias is not None:
            return torch.addmm(bias.to(x.dtype), x, weight.t())
        return torch.mm(x, weight.t(), out=out)
    return _dense(True, x, weight, bias, 1.0, out)


def dense_grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """scale * grad_y W for grad_y [M, N] and a dense W [N, K] of its dtype, summed in fp32. Returns [M, K], in ``out``
    if that is given (contiguous)."""
    if grad_y.dtype.itemsize > 2:
        product = torch.mm(grad_y, weight, out=out)
        return product if scale == 1.0 else product.mul_(scale)
    return _dense(False, grad_y, weight, None, scale, out)
