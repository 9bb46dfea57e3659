"""gptq_4bit: codes of a matrix under given scales, each column's rounding error made good by the later columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import fake, implement
from qlora_native.ops.quantize_4bit import check as check_format


@fake("gptq_4bit")
def shapes(t: Tensor, factor: Tensor, order: Tensor, scales: Tensor, quant_type: int, block_size: int) -> Tensor:
    """The packed codes, uninitialized; refuses scales that do not fit."""
    check_format(quant_type, block_size)
    blocks = -(-t.numel() // block_size)
    if list(scales.shape) != [blocks]:
        raise ValueError(
            f"gptq_4bit: scales are {list(scales.shape)}: expected [{blocks}] for a weight {list(t.shape)} in blocks "
            f"of {block_size}."
        )
    return t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8)


@implement("gptq_4bit", "CPU")
def cpu(t: Tensor, factor: Tensor, order: Tensor, scales: Tensor, quant_type: int, block_size: int) -> Tensor:
    packed = shapes(t, factor, order, scales, quant_type, block_size)
    dense, factor, order, scales = (x.contiguous() for x in (t, factor, order, scales))
    source = dense.data_ptr(), DTYPE_NUMBER[t.dtype], t.shape[0], t.shape[1], block_size, quant_type
    _C.gptq_4bit(*source, factor.data_ptr(), order.data_ptr(), scales.data_ptr(), packed.data_ptr())
    return packed


@implement("gptq_4bit", "CompositeExplicitAutograd")
def anywhere(*arguments: Any) -> Tensor:
    shapes(*arguments)
    return reference.gptq(*arguments)
