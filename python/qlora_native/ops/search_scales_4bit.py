"""search_scales_4bit: for each block, the best of the scales that its format can store, and the codes under it."""

from __future__ import annotations

import torch

from qlora_native import _C, reference
from qlora_native.ops._library import fake, implement, native_dtype
from qlora_native.ops.quantize_4bit import check as check_tensor

Pair = tuple[torch.Tensor, torch.Tensor]


def check(
    t: torch.Tensor,
    moment: torch.Tensor,
    table: torch.Tensor,
    multiplier: torch.Tensor,
    offset: torch.Tensor,
    initial: torch.Tensor,
    group: int,
    quant_type: int,
    block_size: int,
) -> None:
    """Refuses sizes and dtypes that do not fit, whatever the device."""
    check_tensor(t, quant_type, block_size)
    blocks = -(-t.numel() // block_size)
    if group < 1 or not 1 <= table.numel() <= 256:
        raise ValueError(
            f"search_scales_4bit: group is {group}, table has {table.numel()} values: expected 1 or more, and 1 to 256."
        )
    width = t.shape[-1] if t.dim() else 1
    sizes = (
        ("moment", moment, torch.float32, width),
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


def empty_outputs(t: torch.Tensor, initial: torch.Tensor) -> Pair:
    """The packed codes and the index of each block's scale."""
    return t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8), initial.new_empty(initial.shape)


@implement("search_scales_4bit", "CPU")
def cpu(
    t: torch.Tensor,
    moment: torch.Tensor,
    table: torch.Tensor,
    multiplier: torch.Tensor,
    offset: torch.Tensor,
    initial: torch.Tensor,
    group: int,
    low: float,
    high: float,
    quant_type: int,
    block_size: int,
) -> Pair:
    check(t, moment, table, multiplier, offset, initial, group, quant_type, block_size)
    packed, chosen = empty_outputs(t, initial)
    if t.numel() == 0:
        return packed, chosen
    dense, moment, table, multiplier, initial = (x.contiguous() for x in (t, moment, table, multiplier, initial))
    _C.search_scales_4bit(
        dense.data_ptr(),
        native_dtype(t.dtype),
        t.numel(),
        moment.numel(),
        block_size,
        quant_type,
        moment.data_ptr(),
        table.data_ptr(),
        table.numel(),
        group,
        multiplier.data_ptr(),
        float(offset),
        low,
        high,
        initial.data_ptr(),
        packed.data_ptr(),
        chosen.data_ptr(),
    )
    return packed, chosen


@implement("search_scales_4bit", "CompositeExplicitAutograd")
def anywhere(
    t: torch.Tensor,
    moment: torch.Tensor,
    table: torch.Tensor,
    multiplier: torch.Tensor,
    offset: torch.Tensor,
    initial: torch.Tensor,
    group: int,
    low: float,
    high: float,
    quant_type: int,
    block_size: int,
) -> Pair:
    check(t, moment, table, multiplier, offset, initial, group, quant_type, block_size)
    return reference.search_scales(
        t, moment, table, multiplier, offset, initial, group, low, high, quant_type, block_size
    )


@fake("search_scales_4bit")
def shapes(
    t: torch.Tensor,
    moment: torch.Tensor,
    table: torch.Tensor,
    multiplier: torch.Tensor,
    offset: torch.Tensor,
    initial: torch.Tensor,
    group: int,
    low: float,
    high: float,
    quant_type: int,
    block_size: int,
) -> Pair:
    check(t, moment, table, multiplier, offset, initial, group, quant_type, block_size)
    return empty_outputs(t, initial)
