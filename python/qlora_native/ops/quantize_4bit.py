"""quantize_4bit: a float tensor to 4-bit codes and scales.

In each block of the flattened tensor, scale = max |t| and code = the nearest of 16 levels to t / scale. With
``double_quant`` the scales in turn are codes of 8 bits: scale = nested_code[code] * nested_absmax + nested_offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import _C, reference
from qlora_native._buffers import expect_pages, scratch
from qlora_native.ops._library import cuda_kernels, fake, implement, plain

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def check(quant_type: int, block_size: int) -> None:
    """Refuses formats that are not there."""
    if quant_type not in (0, 1):
        raise ValueError(f"quantize: quant_type number is {quant_type}: expected 0 (nf4) or 1 (fp4).")
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(
            f"quantize: block_size is {block_size}: expected a power of two from 32 to 4096."
        )


def empty_codes(t: Tensor) -> Tensor:
    """For the packed codes of a dense tensor, two a byte."""
    return t.new_empty((t.numel() + 1) // 2, dtype=torch.uint8)


def empty_outputs(numel: int, device: torch.device, block_size: int, double_quant: bool) -> Outputs:
    """packed, absmax (codes when double-quantized), nested_absmax, nested_offset; the nested ones empty without it."""
    blocks = (numel + block_size - 1) // block_size
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
    sizes = ((blocks + 255) // 256, ()) if double_quant else (0, 0)
    nested_absmax, nested_offset = (
        torch.empty(size, dtype=torch.float32, device=device) for size in sizes
    )
    return packed, absmax, nested_absmax, nested_offset


@fake("quantize_4bit")
def outputs(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    check(quant_type, block_size)
    return empty_outputs(t.numel(), t.device, block_size, double_quant)


def _refuse_non_finite(t: Tensor, index: int) -> None:
    if index >= 0:
        raise ValueError(reference.non_finite_message(index, t))


@implement("quantize_4bit", "CPU")
def cpu(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    packed, absmax, *nested = results = outputs(t, quant_type, block_size, double_quant)
    dense = t.contiguous()
    expect_pages(packed)
    block_max = scratch(absmax.numel(), torch.float32) if double_quant else absmax
    source = (dense, t.dtype, t.numel(), block_size, quant_type)
    _refuse_non_finite(dense, _C.quantize_4bit(*plain(source), *plain((packed, block_max))))
    if double_quant:
        double_quantize(block_max, absmax, *nested)
    return results


def double_quantize(
    scales: Tensor, absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor
) -> None:
    """Stores CPU ``scales``, fp32 [blocks], in 8 bits: codes, uint8 [blocks], and the two tensors that decode them."""
    _C.quantize_scales(*plain((scales, scales.numel(), absmax, nested_absmax, nested_offset)))


@implement("quantize_4bit", "CUDA")
def cuda(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    module = cuda_kernels().native(t.device)
    if module is None:
        return anywhere(t, quant_type, block_size, double_quant)
    packed, absmax, *nested = results = outputs(t, quant_type, block_size, double_quant)
    dense = t.contiguous()
    blocks = absmax.numel()
    block_max = t.new_empty(blocks, dtype=torch.float32) if double_quant else absmax
    first_bad = t.new_empty((), dtype=torch.int64)
    with cuda_kernels().launching(t.device) as stream:
        source = (t.dtype, dense, t.numel(), block_size, quant_type)
        module.quantize_4bit(*plain(source), *plain((packed, block_max, first_bad)), stream)
        if double_quant:
            workspace = t.new_empty(module.quantize_scales_workspace(blocks), dtype=torch.uint8)
            targets = (absmax, *nested, workspace, workspace.numel())
            module.quantize_scales(*plain((block_max, blocks, *targets)), stream)
    _refuse_non_finite(dense, int(first_bad))  # waits for the device, once
    return results


@implement("quantize_4bit", "CompositeExplicitAutograd")
def anywhere(t: Tensor, quant_type: int, block_size: int, double_quant: bool) -> Outputs:
    check(quant_type, block_size)
    packed, absmax = reference.quantize_blocks(t, quant_type, block_size)
    if double_quant:
        return packed, *reference.quantize_scales(absmax)
    return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
