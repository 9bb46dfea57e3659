"""Paged optimizer states on a GPU, within 192 MiB: a step against an unpaged one, and what it moved."""

from __future__ import annotations

from typing import Any

import torch
from common import timings
from gpu_timing import Case, Context, device, interleaved_calls

import qlora_native as qn

STATE_BYTES, BUDGET = 192 << 20, 48 << 20  # of the arena; of it, on the device at a time
TINY_STATE_BYTES, TINY_BUDGET = 4 << 20, 1 << 20
TENSORS = 16


def _optimizer(state_bytes: int, **options: Any) -> tuple[list[torch.nn.Parameter], qn.optim.AdamW]:
    torch.manual_seed(0)
    numel = state_bytes // 8 // TENSORS
    params = [torch.nn.Parameter(torch.randn(numel).to(device())) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    return params, qn.optim.AdamW(params, lr=1e-3, max_norm=1.0, **options)


def run(context: Context) -> None:
    """The one row."""
    for case in cases(context.dry):
        context.row(case, lambda: paging_row(context.dry, context.rounds))


def cases(dry: bool) -> list[Case]:
    """k is the number of parameters."""
    return [Case("paged_adamw_step", k=(TINY_STATE_BYTES if dry else STATE_BYTES) // 8, form="32 bits")]


def paging_row(dry: bool, rounds: int) -> dict[str, Any]:
    """Steps in turns: three quarters of the states are paged out, or none. The same bytes; which store was taken, and
    whether torch's view of managed memory is that memory."""
    state_bytes, budget = (TINY_STATE_BYTES, TINY_BUDGET) if dry else (STATE_BYTES, BUDGET)
    params, paged = _optimizer(state_bytes, paged=True, page_budget=budget)
    others, plain = _optimizer(state_bytes, paged=False)
    seconds = interleaved_calls({"ours": paged.step, "unpaged": plain.step}, rounds)
    before = paged.paging_statistics()["bytes_in"]
    paged.step(), plain.step()
    statistics = paged.paging_statistics()
    moved = statistics["bytes_in"] - before
    match = all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    pages = next(iter(paged._pages.values()))
    managed = getattr(pages, "managed", False)
    if managed:
        places = [(store.address, store.address + store.num_bytes) for store in pages.stores]
        views = [paged.state[param]["exp_avg"].data_ptr() for param in params]
        match = match and all(any(low <= view < high for low, high in places) for view in views)
    return {
        "match": match and moved > 0 and statistics["resident_bytes"] <= budget,
        "store": type(pages).__name__ + (" managed" if managed else ""),
        "state_mib": statistics["state_bytes"] >> 20,
        "resident_mib": statistics["resident_bytes"] >> 20,
        "moved_in_mib_a_step": moved >> 20,
    } | timings(seconds)
