"""search_scales_4bit: for each block, the best of the scales that its format can store, and the codes under it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qlora_native import reference
from qlora_native.ops._library import Function, define
from qlora_native.ops.quantize_4bit import check as check_format
from qlora_native.ops.quantize_4bit import empty_codes

Pair = tuple[Tensor, Tensor]


def outputs(*arguments: Any) -> Pair:
    """The packed codes and the index of each block's scale."""
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
    return empty_codes(t), initial.new_empty(blocks)


def native(run: Function, results: Pair, *arguments: Any) -> None:
    *tensors, group, low, high, quant_type, block_size = arguments
    t, moment, table, multiplier, offset, initial = (tensor.contiguous() for tensor in tensors)
    if t.numel() == 0:
        return
    source = (t, t.dtype, t.numel(), moment.numel(), block_size, quant_type)
    scales = (moment, table, table.numel(), group, multiplier, float(offset), low, high)
    run(*source, *scales, initial, *results)


define("search_scales_4bit", outputs, reference.search_scales, native, on_cuda=False)
