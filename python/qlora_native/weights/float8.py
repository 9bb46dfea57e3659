"""Weights in 8-bit floats with a scale for each block, as checkpoints of the method "fp8" have them."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIX = "_scale_inv"  # ends the name of the scales of a weight
_ROWS = 128  # read at a time; the fp32 products of so many rows exist at once


def unscaled(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, K] times its scales [ceil(N / n), ceil(K / k)], each block of n x k by its own, in fp32; as ``dtype``.

    The shapes give the block sizes: the power of two that makes so many blocks, or equal parts; ValueError if none do.
    """
    if weight.dim() != 2 or scales.numel() == 1:
        return (weight.float() * scales.float().reshape(())).to(dtype)
    rows, columns = (_block(weight.shape, scales.shape, dim) for dim in (0, 1))
    per_column = scales.float().repeat_interleave(columns, 1)[:, : weight.shape[1]]
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        block = torch.arange(start, min(start + _ROWS, weight.shape[0]), device=weight.device) // rows
        result[part] = weight[part].float().mul_(per_column[block])
    return result


def _block(shape: torch.Size, grid: torch.Size, dim: int) -> int:
    if len(grid) == 2:
        size, count = shape[dim], grid[dim]
        powers = [1 << bit for bit in range(size.bit_length() + 1) if -(-size // (1 << bit)) == count]
        if powers:
            return powers[-1]
        if size % count == 0:
            return size // count
    raise ValueError(
        f"an 8-bit weight {list(shape)} has scales {list(grid)}: expected one a block of equal size."
    )
