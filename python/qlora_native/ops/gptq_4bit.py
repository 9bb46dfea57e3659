"""gptq_4bit: codes of a matrix under given scales, each column's rounding error made good by the later columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import fake, implement
from qlora_native.ops.quantize_4bit import check as check_tensor


@fake("gptq_4bit")
def shapes(t: Tensor, factor: Tensor, order: Tensor, scales: Tensor, quant_type: int, block_size: int) -> Tensor:
    """The packed codes, uninitialized; refuses sizes and dtypes that do not fit."""
    check_tensor(t, quant_type, block_size)
    if t.dim() != 2:
        raise ValueError(f"gptq_4bit: weight is {list(t.shape)}: expected two dimensions, [N, K].")
    k = t.shape[1]
    sizes = (
        ("factor", factor, torch.float32, [k, k]),
        ("order", order, torch.int64, [k]),
        ("scales", scales, torch.float32, [-(-t.numel() // block_size)]),
    )
    for name, tensor, dtype, shape in sizes:
        if tensor.dtype != dtype or list(tensor.shape) != shape or tensor.device != t.device:
            raise ValueError(
                f"gptq_4bit: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected {dtype} "
                f"{shape} on {t.device} for a weight {list(t.shape)} in blocks of {block_size}."
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
