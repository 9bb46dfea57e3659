"""Paged optimizer states on a GPU, within 256 MiB: a step against an unpaged one, and what it moved."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import timings
from gpu_timing import device, on_gpu

import qlora_native as qn

STATE_BYTES, BUDGET = 256 << 20, 64 << 20  # of the arena; of it, on the device at a time
TINY_STATE_BYTES, TINY_BUDGET = 4 << 20, 1 << 20
TENSORS = 16


def _optimizer(state_bytes: int, **options: Any) -> tuple[list[torch.nn.Parameter], qn.optim.AdamW]:
    torch.manual_seed(0)
    numel = state_bytes // 8 // TENSORS
    params = [torch.nn.Parameter(torch.randn(numel).to(device())) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    return params, qn.optim.AdamW(params, lr=1e-3, max_norm=1.0, **options)


def _timed(step: Any) -> float:
    if on_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paging_row(dry: bool, rounds: int) -> dict[str, Any]:
    """Steps in turns: three quarters of the states are paged out, or none. The same bytes; which store was taken."""
    state_bytes, budget = (TINY_STATE_BYTES, TINY_BUDGET) if dry else (STATE_BYTES, BUDGET)
    params, paged = _optimizer(state_bytes, paged=True, page_budget=budget)
    others, plain = _optimizer(state_bytes, paged=False)
    seconds: dict[str, list[float]] = {"ours": [], "unpaged": []}
    for number in range(rounds + 1):
        before = paged.paging_statistics()["bytes_in"]
        paged_s, plain_s = _timed(paged.step), _timed(plain.step)
        if number > 0:  # the first step makes the tables
            seconds["ours"].append(paged_s)
            seconds["unpaged"].append(plain_s)
    statistics = paged.paging_statistics()
    moved = statistics["bytes_in"] - before
    match = all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    pages = next(iter(paged._pages.values()))
    return {
        "match": match and moved > 0 and statistics["resident_bytes"] <= budget,
        "store": type(pages).__name__ + (" managed" if getattr(pages, "managed", False) else ""),
        "state_mib": statistics["state_bytes"] >> 20,
        "resident_mib": statistics["resident_bytes"] >> 20,
        "moved_in_mib_a_step": moved >> 20,
    } | timings(seconds)
