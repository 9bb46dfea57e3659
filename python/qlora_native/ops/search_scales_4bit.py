"""search_scales_4bit: for each block, the best of the scales that its format can store, and the codes under it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native.ops._library import fake, implement
from qlora_native.ops.quantize_4bit import check as check_format

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
    """The packed codes and the index of each block's scale; refuses sizes that do not fit."""
    t, moment, table, multiplier, offset, initial, group, _, _, quant_type, block_size = arguments
    check_format(quant_type, block_size)
    blocks = -(-t.numel() // block_size)
    if group < 1 or not 1 <= table.numel() <= 256:
        raise ValueError(
            f"search_scales_4bit: group is {group}, table has {table.numel()} values: expected 1 or more, and 1 to 256."
        )
    sizes = (
        ("moment", moment, t.shape[-1] if t.dim() else 1),
        ("multiplier", multiplier, -(-blocks // group)),
        ("offset", offset, 1),
        ("initial", initial, blocks),
    )
    for name, tensor, count in sizes:
        if tensor.numel() != count:
            raise ValueError(
                f"search_scales_4bit: {name} is {list(tensor.shape)}: expected {count} values for a tensor "
                f"{list(t.shape)} in blocks of {block_size}."
            )
    return t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8), initial.new_empty(blocks)
