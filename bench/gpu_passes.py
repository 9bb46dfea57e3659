"""Ops bound by memory on a GPU: dequantize, quantize, AdamW, each against the time that its bytes take."""

from __future__ import annotations

from typing import Any, Literal

import torch
from common import timings
from gpu_products import of_floor
from gpu_timing import Ceilings, device, floor, interleaved_replays, on_gpu
from replay import Call, copies

import qlora_native as qn

DEQUANTIZE_SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096))
TINY_SHAPES = ((64, 128),)
LORA_PARAMETERS = tuple(  # of rank-16 adapters on every layer of an 8B model: A [16, K] and B [N, 16]
    (r, c)
    for n, k in 32 * ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *2 * ((14336, 4096),), (4096, 14336))
    for r, c in ((16, k), (n, 16))
)
TINY_PARAMETERS = ((16, 40), (24, 16), (1, 7))


def dequantize_row(n: int, k: int, dtype: torch.dtype, measured: Ceilings, rounds: int) -> dict[str, Any]:
    """A whole weight to a dense buffer; the bar is 85 % of the bandwidth of a copy."""
    first = qn.quantize(torch.randn(n, k, device=device()))
    num_bytes = first.nbytes + n * k * dtype.itemsize
    outs = [torch.empty(n, k, dtype=dtype, device=device()) for _ in range(copies(num_bytes, device()))]
    calls: list[Call] = [
        lambda out=out: torch.ops.qlora_native.dequantize_4bit.out(out, *first.op_args())  # type: ignore[misc]
        for out in outs
    ]
    seconds = interleaved_replays({"ours": calls}, rounds)
    least = floor(measured, num_bytes)
    seconds["floor"] = [least] * rounds
    calls[0]()
    exact = qn.reference.dequantize(dtype, *first.to("cpu").op_args())
    bars = (of_floor(0.85),) if n * k >= 1 << 24 else ()
    return {"match": bool(torch.equal(outs[0].cpu(), exact))} | timings(seconds, bars, least)


def quantize_row(n: int, k: int, measured: Ceilings, rounds: int) -> dict[str, Any]:
    """bf16 to 4 bits with double quantization. It waits for the device once, so it is timed with its launches."""
    dense = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
    w = qn.quantize(dense)
    seconds = interleaved_replays({"ours": [lambda: qn.quantize(dense)]}, rounds)
    there = qn.quantize(dense.cpu())
    match = torch.equal(w.packed.cpu(), there.packed) and torch.equal(w.absmax.cpu(), there.absmax)
    return {"match": match} | timings(seconds, (), floor(measured, dense.nbytes + w.nbytes))


def _parameters(shapes: tuple[tuple[int, int], ...]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape, device=device())) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def adamw_row(bits: Literal[8, 32], dry: bool, measured: Ceilings, rounds: int) -> dict[str, Any]:
    """A step over all adapters, with clipping, beside torch's fused AdamW (32 bits, without clipping)."""
    shapes = TINY_PARAMETERS if dry else LORA_PARAMETERS
    count = sum(r * c for r, c in shapes)
    ours = qn.optim.AdamW(_parameters(shapes), lr=1e-3, bits=bits, max_norm=1.0)
    rival = torch.optim.AdamW(_parameters(shapes), lr=1e-3, fused=on_gpu())
    seconds = interleaved_replays({"ours": [ours.step], "torch_fused": [rival.step]}, rounds)
    least = floor(measured, count * (28 if bits == 32 else 16 + 4 * 2 / 256 * 2))
    seconds["floor"] = [least] * rounds
    check = _parameters(((64, 64),))
    copy = [torch.nn.Parameter(p.detach().cpu().clone()) for p in check]
    for p, q in zip(check, copy, strict=True):
        q.grad = p.grad.cpu() if p.grad is not None else None
    qn.optim.AdamW(check, lr=1e-3, bits=bits, max_norm=1.0).step()
    qn.optim.AdamW(copy, lr=1e-3, bits=bits, max_norm=1.0).step()
    match = all(torch.equal(p.detach().cpu(), q.detach()) for p, q in zip(check, copy, strict=True))
    return {"match": match, "parameters": count} | timings(seconds, (of_floor(1 / 1.5),), least)
