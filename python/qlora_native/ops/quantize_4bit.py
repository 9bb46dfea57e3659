"""quantize_4bit: a float tensor to 4-bit codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import expect_pages, scratch
from qlora_native.ops._library import fake, implement

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def check(quant_type: int, block_size: int) -> None:
    """Refuses formats that are not there."""
    if quant_type not in (0, 1):
        raise ValueError(f"quantize: quant_type number is {quant_type}: expected 0 (nf4) or 1 (fp4).")
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(f"quantize: block_size is {block_size}: expected a power of two from 32 to 4096.")


def empty_outputs(numel: int, device: torch.device, block_size: int, double_quant: bool) -> Outputs:
    """packed, absmax (codes when double-quantized), nested_absmax, nested_offset; the nested ones empty without it."""
    blocks = (numel + block_size - 1) // block_size
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
    sizes = ((blocks + 255) // 256, ()) if double_quant else (0, 0)
    nested_absmax, nested_offset = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
    return packed, absmax, nested_absmax, nested_offset


@implement("quantize_4bit", "CPU")
def cpu(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    outputs, dense = shapes(t, quant_type, block_size, double_quant), t.contiguous()
    packed, absmax, nested_absmax, nested_offset = outputs
    expect_pages(packed)
    block_max = scratch(absmax.numel(), torch.float32) if double_quant else absmax
    source = dense.data_ptr(), DTYPE_NUMBER[t.dtype], t.numel(), block_size, quant_type
    bad = _C.quantize_4bit(*source, packed.data_ptr(), block_max.data_ptr())
    if bad >= 0:
        raise ValueError(reference.non_finite_message(bad, dense))
    if double_quant:
        double_quantize(block_max, absmax, nested_absmax, nested_offset)
    return outputs


def double_quantize(scales: Tensor, absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> None:
    """Stores CPU ``scales``, fp32 [blocks], in 8 bits: codes, uint8 [blocks], and the two tensors that decode them."""
    targets = absmax.data_ptr(), nested_absmax.data_ptr(), nested_offset.data_ptr()
    _C.quantize_scales(scales.data_ptr(), scales.numel(), *targets)


@implement("quantize_4bit", "CUDA")
def cuda(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    from qlora_native.ops import _cuda_kernels

    outputs, dense = shapes(t, quant_type, block_size, double_quant), t.contiguous()
    module = _cuda_kernels.native(t.device)
    if module is None:
        return anywhere(t, quant_type, block_size, double_quant)
    packed, absmax, nested_absmax, nested_offset = outputs
    blocks = absmax.numel()
    block_max = t.new_empty(blocks, dtype=torch.float32) if double_quant else absmax
    first_bad = t.new_empty((), dtype=torch.int64)
    with _cuda_kernels.launching(t.device) as stream:
        source = DTYPE_NUMBER[t.dtype], dense.data_ptr(), t.numel(), block_size, quant_type
        module.quantize_4bit(*source, packed.data_ptr(), block_max.data_ptr(), first_bad.data_ptr(), stream)
        if double_quant:
            workspace = t.new_empty(module.quantize_scales_workspace(blocks), dtype=torch.uint8)
            targets = absmax.data_ptr(), nested_absmax.data_ptr(), nested_offset.data_ptr()
            room = workspace.data_ptr(), workspace.numel()
            module.quantize_scales(block_max.data_ptr(), blocks, *targets, *room, stream)
    bad = int(first_bad)  # waits for the device, once
    if bad >= 0:
        raise ValueError(reference.non_finite_message(bad, dense))
    return outputs


@implement("quantize_4bit", "CompositeExplicitAutograd")
def anywhere(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    check(quant_type, block_size)
    packed, absmax = reference.quantize_blocks(t, quant_type, block_size)
    if double_quant:
        return packed, *reference.quantize_scales(absmax)
    return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)


@fake("quantize_4bit")
def shapes(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    check(quant_type, block_size)
    return empty_outputs(t.numel(), t.device, block_size, double_quant)
