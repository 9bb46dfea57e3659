"""What the tests of paged optimizers share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers import same_bytes

import qlora_native as qn

Params = list[torch.nn.Parameter]
MIB = 1 << 20
SIZES = (5, 4097, 600_000, 0, 70_000, 800_000)  # small ones that share a chunk, and some that are cut
OPTIMIZERS = (qn.optim.AdamW, qn.optim.Adam, qn.optim.Lion)


def parameters(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def give_grads(params: Params, seed: int) -> None:
    """Now and then a parameter has none."""
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if (seed + i) % 7 == 6 else grad


def train(
    optimizer: torch.optim.Optimizer,
    params: Params,
    seeds: range,
    after: Callable[[int], None] = lambda seed: None,
) -> None:
    for seed in seeds:
        give_grads(params, seed)
        optimizer.step()
        after(seed)


def same_training(a: tuple[Params, Any], b: tuple[Params, Any]) -> bool:
    """Parameters and states, byte for byte."""
    for p, q in zip(a[0], b[0], strict=True):
        mine, theirs = a[1].state[p], b[1].state[q]
        if mine.keys() != theirs.keys() or not same_bytes(p.detach(), q.detach()):
            return False
        if not all(same_bytes(mine[key], theirs[key]) for key in mine):
            return False
    return True


@contextmanager
def sampled(optimizer: Any) -> Iterator[list[int]]:
    """The resident bytes of its states, seen again and again by another thread."""
    seen: list[int] = []
    ends = threading.Event()

    def look() -> None:
        while not ends.wait(0.0005):
            seen.append(optimizer.paging_statistics()["resident_bytes"])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ends.set()
        thread.join()
