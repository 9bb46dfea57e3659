"""requantize_4bit: the codes nearest to W + scale * B A under the scales that W has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, _native, reference
from qlora_native.ops._library import Weight, fake, implement, say_once

ELEMENTS = 1 << 22  # at a time, where there is no kernel


@fake("requantize_4bit")
def shapes(a: Tensor, b: Tensor, scale: float, *arguments: Any) -> Tensor:
    """The packed codes, uninitialized; refuses rows of a GGUF type that are no whole blocks."""
    weight = Weight(*arguments)
    if weight.quant_type in _native.GGUF_BLOCKS and weight.shape[-1] % weight.block_size:
        raise ValueError(
            f"requantize_4bit: the weight is {list(weight.shape)}: expected rows of whole blocks of "
            f"{_native.QUANT_TYPES[weight.quant_type]}, {weight.block_size} elements."
        )
    return torch.empty_like(weight.packed)


@implement("requantize_4bit", "CPU")
def cpu(a: Tensor, b: Tensor, scale: float, *arguments: Any) -> Tensor:
    packed, weight = shapes(a, b, scale, *arguments), Weight(*arguments)
    a, b, (n, k) = a.contiguous(), b.contiguous(), weight.shape
    _C.requantize_4bit(a.data_ptr(), b.data_ptr(), a.shape[0], scale, n, k, packed.data_ptr(), weight.pointers())
    return packed


@implement("requantize_4bit", "CompositeExplicitAutograd")
def anywhere(a: Tensor, b: Tensor, scale: float, *arguments: Any) -> Tensor:
    packed, weight = shapes(a, b, scale, *arguments), Weight(*arguments)
    say_once(f"qlora_native: no kernel of requantize_4bit on {packed.device.type}; computing it with torch's own ops.")
    n, k = weight.shape
    aligned = weight.block_size // math.gcd(weight.block_size, max(k, 1))  # rows that end where a block does
    step, done = max(1, ELEMENTS // max(1, aligned * k)) * aligned, 0
    for first in range(0, n, step):
        rows = weight.slice(first, min(first + step, n))
        codes = reference.requantize(a, b[first : first + step], scale, *rows).view(-1)
        packed.view(-1)[done : done + len(codes)] = codes
        done += len(codes)
    return packed
