"""gptq_4bit: codes of a matrix under given scales, each column's rounding error made good by the later columns."""

from __future__ import annotations

import torch

from qlora_native import _C, reference
from qlora_native.ops._library import fake, implement, native_dtype
from qlora_native.ops.quantize_4bit import check as check_tensor


def check(
    t: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, scales: torch.Tensor, quant_type: int, block_size: int
) -> None:
    """Refuses sizes and dtypes that do not fit, whatever the device."""
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


@implement("gptq_4bit", "CPU")
def cpu(
    t: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, scales: torch.Tensor, quant_type: int, block_size: int
) -> torch.Tensor:
    check(t, factor, order, scales, quant_type, block_size)
    n, k = t.shape
    packed = t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8)
    dense, factor, order, scales = (x.contiguous() for x in (t, factor, order, scales))
    _C.gptq_4bit(
        dense.data_ptr(),
        native_dtype(t.dtype),
        n,
        k,
        block_size,
        quant_type,
        factor.data_ptr(),
        order.data_ptr(),
        scales.data_ptr(),
        packed.data_ptr(),
    )
    return packed


@implement("gptq_4bit", "CompositeExplicitAutograd")
def anywhere(
    t: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, scales: torch.Tensor, quant_type: int, block_size: int
) -> torch.Tensor:
    check(t, factor, order, scales, quant_type, block_size)
    return reference.gptq(t, factor, order, scales, quant_type, block_size)


@fake("gptq_4bit")
def shapes(
    t: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, scales: torch.Tensor, quant_type: int, block_size: int
) -> torch.Tensor:
    check(t, factor, order, scales, quant_type, block_size)
    return t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8)
