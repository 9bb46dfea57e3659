"""Products with a quantised CPU weight through torch's own GEMM, one bounded panel at a time.

A panel is decoded into the thread's scratch buffer and multiplied at once; a whole weight is never dense. Panels of the
forward product are rows of W (complete sums, so one rounding each), those of the input gradient are columns of it.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch

from .. import _C
from .._native import DTYPE_NUMBER
from ._library import Weight, native_dtype, scratch
from .dequantize_4bit import decode_panel

# A panel of this size stays in a shared cache beside the activations.
PANEL_BYTES = 8 << 20
# oneDNN multiplies by a narrower matrix on a single thread at some numbers of rows (measured with 384 to 832 columns
# and 512 or 1,024 rows), at half the rate; so panels are wider, up to MAX_PANEL_BYTES, or as narrow as is safe.
FULL_RATE_WIDTH = 1024
SAFE_WIDTH = 256
MAX_PANEL_BYTES = 32 << 20
ALIGNMENT = 64  # of the cuts, in rows or columns


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch multiplies fast here: oneDNN takes 16-bit operands only on some CPUs."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


def _panel(
    pointers: tuple[int, ...],
    row_length: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    dtype: torch.dtype,
    compute: torch.dtype,
) -> torch.Tensor:
    """W[rows, columns] rounded to ``dtype``, held in ``compute``."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    stored = torch.float32 if dtype == torch.float64 else dtype
    panel = scratch(height * width, stored).view(height, width)
    decode_panel(pointers, row_length, rows, columns, panel)
    return panel if compute == stored else panel.to(compute)


def cuts(length: int, other: int, itemsize: int, panel_bytes: int) -> list[tuple[int, int]]:
    """[0, length) in pieces that make panels with ``other`` elements of ``itemsize`` bytes on the other side."""
    row_bytes = max(1, other * itemsize)
    count = -(-length * row_bytes // panel_bytes)
    if length < count * FULL_RATE_WIDTH:
        count = max(1, length // FULL_RATE_WIDTH)
    if -(-length // count) * row_bytes > MAX_PANEL_BYTES:
        width = max(ALIGNMENT, min(SAFE_WIDTH, panel_bytes // row_bytes // ALIGNMENT * ALIGNMENT))
        count = -(-length // width)
        edges = [min(i * width, length) for i in range(count + 1)]
    else:
        edges = [i * length // count // ALIGNMENT * ALIGNMENT for i in range(count)] + [length]
    return [(first, last) for first, last in itertools.pairwise(edges) if first < last]


def _few_tokens(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias for so few rows that the weight's bytes are the work: decoded in registers, never as a panel."""
    rows, columns = weight.shape
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    operand = x.contiguous()
    addend = None if bias is None else bias.to(x.dtype).contiguous()
    _C.linear_4bit(
        native_dtype(x.dtype),
        operand.data_ptr(),
        0 if addend is None else addend.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        rows,
        columns,
        *weight.pointers(),
    )
    return y


def forward(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """x W^T + bias + scale * xa b^T for x [M, K]; ``low_rank`` is (xa [M, r], b [N, r], scale). Returns [M, N]."""
    rows, columns = weight.shape
    if x.shape[0] <= _C.linear_4bit_max_tokens and x.dtype in DTYPE_NUMBER:
        y = _few_tokens(x, weight, bias)
        if low_rank is not None:
            xa, b, scale = low_rank
            y.addmm_(xa, b.t(), alpha=scale)
        return y
    compute = product_dtype(x.dtype)
    y = torch.empty(x.shape[0], rows, dtype=compute)
    if x.shape[0] == 0 or rows == 0:
        return y.to(x.dtype)
    pointers = weight.pointers()
    operand = x.to(compute)
    addend = None if bias is None else bias.to(compute)
    for first, last in cuts(rows, columns, x.dtype.itemsize, PANEL_BYTES):
        panel = _panel(pointers, columns, (first, last), (0, columns), x.dtype, compute).t()
        target = y[:, first:last]
        if addend is None:
            torch.mm(operand, panel, out=target)
        else:
            torch.addmm(addend[first:last], operand, panel, out=target)
        if low_rank is not None:
            xa, b, scale = low_rank
            target.addmm_(xa.to(compute), b[first:last].to(compute).t(), alpha=scale)
    return y.to(x.dtype)


def grad_input(grad_y: torch.Tensor, weight: Weight) -> torch.Tensor:
    """grad_y W for grad_y [M, N]. Returns [M, K]."""
    rows, columns = weight.shape
    compute = product_dtype(grad_y.dtype)
    grad_x = torch.empty(grad_y.shape[0], columns, dtype=compute)
    if grad_y.shape[0] == 0 or columns == 0:
        return grad_x.to(grad_y.dtype)
    pointers = weight.pointers()
    operand = grad_y.to(compute)
    # The GEMM reorders grad_y for each panel: fewer, larger ones cost less (measured).
    for first, last in cuts(columns, rows, grad_y.dtype.itemsize, MAX_PANEL_BYTES):
        panel = _panel(pointers, columns, (0, rows), (first, last), grad_y.dtype, compute)
        torch.mm(operand, panel, out=grad_x[:, first:last])
    return grad_x.to(grad_y.dtype)
