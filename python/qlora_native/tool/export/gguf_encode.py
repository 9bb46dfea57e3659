"""Floats into the element types of GGUF files: by the ``gguf`` package where it has the type, here where it has not.

Sums run over halves, so the bytes depend on neither the number of threads nor the width of the CPU's vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from qlora_native import gguf_blocks
from qlora_native._native import GGUF_BLOCKS, quant_type_number
from qlora_native.reference import reciprocals

_AT_A_TIME = 1 << 17  # elements, whose intermediate tensors stay in the caches


def encode(rows: Tensor, kind: Kind) -> np.ndarray:
    """The bytes of rows fp32 [n, K], K whole blocks; uint8 or 16-bit floats [n, ...].

    Source of Q4_K's search, least squares from several starts: make_qkx2_quants of llama.cpp.
    """
    encoder = _ENCODERS.get(kind)
    if encoder is None:
        return gguf.quants.quantize(rows.numpy(), kind)
    number = quant_type_number(kind.name.lower())
    size = GGUF_BLOCKS[number][0]
    parts = rows.reshape(-1, size).split(_AT_A_TIME // size)
    return torch.cat([encoder(part, number) for part in parts]).view(len(rows), -1).numpy()


def _sum(t: Tensor) -> Tensor:
    """The sums [..., 1] over a last dimension of 2^i elements."""
    while (half := t.shape[-1] // 2) > 0:
        t = t[..., :half] + t[..., half:]
    return t


def _header(number: int, *parts: Tensor) -> Tensor:
    """Blocks [n, bytes] that begin with these parts, halves or bytes [n, ...]; the rest is zeros."""
    head = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
    return F.pad(head, (0, GGUF_BLOCKS[number][1] - head.shape[1]))


def _iq4_nl(x: Tensor, number: int) -> Tensor:
    """The scale with the least squared error, from starts that put the largest element at or near an outer level."""
    levels = gguf_blocks.levels(number)
    # Levels are whole numbers and their borders halves of them: a table by twice the value takes the place of a search.
    values = torch.arange(-256, 257) / 2
    code_of = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    level_of = levels[code_of]

    def nearest(inverse: Tensor, table: Tensor) -> Tensor:
        twice = (x * inverse).mul_(2).ceil_().clamp_(-256, 256)
        at = twice.add_(256).int()
        return table.index_select(0, at.view(-1)).view(x.shape)

    largest = reciprocals(x.gather(1, x.abs().argmax(1, keepdim=True)))
    least = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest)
    for start in (-127.0, -115.0, 113.0):
        inverse = start * largest
        for _ in range(2):
            level = nearest(inverse, level_of)
            scale = _sum(x * level) * reciprocals(_sum(level * level))
            scale = scale.half().float()  # as the block stores it
            inverse = reciprocals(scale)
        error = _sum((x - nearest(inverse, level_of) * scale).square())
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    blocks = _header(number, best.half())
    codes = nearest(reciprocals(best), code_of.to(torch.uint8))
    return gguf_blocks.with_codes(blocks, codes, number)


def _q4_k(x: Tensor, number: int) -> Tensor:
    """Scale and minimum of each run of 32, by least squares in turns with the codes; then those of the whole block."""
    x = x.view(-1, 8, 32)

    def codes(factor: Tensor, minimum: Tensor) -> Tensor:
        return (x + minimum).mul_(reciprocals(factor)).round_().clamp_(0, 15)

    low = x.amin(-1, keepdim=True).clamp(max=0)
    width = x.amax(-1, keepdim=True) - low
    least = torch.full_like(low, torch.inf)
    best = torch.zeros_like(low)
    minima = torch.zeros_like(low)
    # So many levels lie between the smallest and the largest element.
    for distances in (15.7, 15.0, 14.3, 13.6, 12.9, 12.2):
        factor = width / distances
        minimum = -low
        code = codes(factor, minimum)
        for _ in range(2):
            factor, minimum = _least_squares(x, code)
            code = codes(factor, minimum)
        error = _sum((x - (code * factor - minimum)).square())
        better = (error < least) & (factor >= 0)
        best = torch.where(better, factor, best)
        minima = torch.where(better, minimum, minima)
        least = torch.where(better, error, least)

    def rounded(of_runs: Tensor) -> tuple[Tensor, Tensor]:
        unit = (of_runs.amax(1, keepdim=True) / 63).half().float()
        return unit, (of_runs * reciprocals(unit)).round_().clamp_(0, 63)

    def inner(p: Tensor, q: Tensor) -> Tensor:
        return _sum((p * q).flatten(1))[..., None]

    unit, scale = rounded(best)
    minimum_unit, minimum = rounded(minima)
    # Under the rounded scales and minima of the runs, the two units with which unit a - minimum_unit b is nearest to x:
    # unit aa - minimum_unit ab = xa,  unit ab - minimum_unit bb = xb.
    a = codes(unit * scale, minimum_unit * minimum) * scale
    b = minimum.expand_as(x)
    aa = inner(a, a)
    ab = inner(a, b)
    bb = inner(b, b)
    xa = inner(x, a)
    xb = inner(x, b)
    determinant = aa * bb - ab * ab
    inverse = reciprocals(determinant)
    solved = (xa * bb - xb * ab) * inverse
    minimum_solved = (xa * ab - xb * aa) * inverse
    fits = (solved > 0) & (minimum_solved >= 0) & (determinant > 1e-5 * aa * bb)
    unit = torch.where(fits, solved, unit).half()
    minimum_unit = torch.where(fits, minimum_solved, minimum_unit).half()
    code = codes(unit.float() * scale, minimum_unit.float() * minimum).to(torch.uint8)
    # Six bits each: those of the last four runs lie apart, four beside each other's and two above the first ones'.
    s, t = scale.to(torch.uint8).view(-1, 2, 4).unbind(1)
    m, n = minimum.to(torch.uint8).view(-1, 2, 4).unbind(1)
    packed = s | t >> 4 << 6, m | n >> 4 << 6, t & 15 | (n & 15) << 4
    header = _header(number, unit[..., 0], minimum_unit[..., 0], *packed)
    return gguf_blocks.with_codes(header, code.flatten(1), number)


def _least_squares(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and minimum, 0 or more, with which code * factor - minimum is nearest to x."""
    # The normal equations of sum (x - f q + m)^2:  f qq - m q = xq,  f q - m n = xs.
    n = x.shape[-1]
    q = _sum(code)
    qq = _sum(code * code)
    xs = _sum(x)
    xq = _sum(x * code)
    spread = n * qq - q * q
    inverse = reciprocals(spread)
    factor = (n * xq - q * xs) * inverse
    minimum = (q * xq - qq * xs) * inverse
    # A minimum below 0, or codes that are all the same.
    alone = (minimum < 0) | (spread <= 1e-5 * n * qq)
    without = torch.where(qq == 0, -xs / n, 0.0).clamp(min=0)
    return torch.where(alone, xq * reciprocals(qq), factor), torch.where(alone, without, minimum)


_ENCODERS: dict[Kind, Callable[[Tensor, int], Tensor]] = {Kind.IQ4_NL: _iq4_nl, Kind.Q4_K: _q4_k}
