"""search_scales_4bit: for each block, the best of the scales that its format can store, and the codes under it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import fake, implement
from qlora_native.ops.quantize_4bit import check as check_tensor

Pair = tuple[Tensor, Tensor]


@implement("search_scales_4bit", "CPU")
def cpu(*arguments: Any) -> Pair:
    packed, chosen = outputs = shapes(*arguments)
    t, moment, table, multiplier, offset, initial, group, low, high, quant_type, block_size = arguments
    if t.numel() == 0:
        return outputs
    dense, moment, table, multiplier, initial = (x.contiguous() for x in (t, moment, table, multiplier, initial))
    source = dense.data_ptr(), DTYPE_NUMBER[t.dtype], t.numel(), moment.numel(), block_size, quant_type
    scales = moment.data_ptr(), table.data_ptr(), table.numel(), group, multiplier.data_ptr(), float(offset), low, high
    _C.search_scales_4bit(*source, *scales, initial.data_ptr(), packed.data_ptr(), chosen.data_ptr())
    return outputs


@implement("search_scales_4bit", "CompositeExplicitAutograd")
def anywhere(*arguments: Any) -> Pair:
    shapes(*arguments)
    return reference.search_scales(*arguments)


@fake("search_scales_4bit")
def shapes(*arguments: Any) -> Pair:
    """The packed codes and the index of each block's scale; refuses sizes and dtypes that do not fit."""
    t, moment, table, multiplier, offset, initial, group, _, _, quant_type, block_size = arguments
    check_tensor(t, quant_type, block_size)
    blocks = -(-t.numel() // block_size)
    if group < 1 or not 1 <= table.numel() <= 256:
        raise ValueError(
            f"search_scales_4bit: group is {group}, table has {table.numel()} values: expected 1 or more, and 1 to 256."
        )
    sizes = (
        ("moment", moment, torch.float32, t.shape[-1] if t.dim() else 1),
        ("table", table, torch.float32, table.numel()),
        ("multiplier", multiplier, torch.float32, -(-blocks // group)),
        ("offset", offset, torch.float32, 1),
        ("initial", initial, torch.uint8, blocks),
    )
    for name, tensor, dtype, count in sizes:
        if tensor.dtype != dtype or tensor.numel() != count or tensor.device != t.device:
            raise ValueError(
                f"search_scales_4bit: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected "
                f"{count} {dtype} values on {t.device} for a tensor {list(t.shape)} in blocks of {block_size}."
            )
    return t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8), initial.new_empty(initial.shape)
