"""gptq_4bit: codes of a matrix under given scales, each column's rounding error made good by the later columns."""

from __future__ import annotations

from torch import Tensor

from qlora_native import reference
from qlora_native.ops._library import Function, define
from qlora_native.ops.quantize_4bit import check as check_format
from qlora_native.ops.quantize_4bit import empty_codes


def output(
    t: Tensor, factor: Tensor, order: Tensor, scales: Tensor, quant_type: int, block_size: int
) -> Tensor:
    """The packed codes."""
    check_format(quant_type, block_size)
    blocks = -(-t.numel() // block_size)
    if list(scales.shape) != [blocks]:
        raise ValueError(
            f"gptq_4bit: scales are {list(scales.shape)}: expected [{blocks}] for a weight {list(t.shape)} in blocks "
            f"of {block_size}."
        )
    return empty_codes(t)


def native(
    run: Function,
    packed: Tensor,
    t: Tensor,
    factor: Tensor,
    order: Tensor,
    scales: Tensor,
    quant_type: int,
    block_size: int,
) -> None:
    dense, *others = (tensor.contiguous() for tensor in (t, factor, order, scales))
    run(dense, t.dtype, *t.shape, block_size, quant_type, *others, packed)


define("gptq_4bit", output, reference.gptq, native, on_cuda=False)
