"""Huge pages for large weights.

A product of one token reads a weight once, from end to end. With pages of 4 KiB the processor looks up an address a
row or two, in a virtual machine through two tables.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

# linux/mman.h and include/uapi/asm-generic/mman-common.h
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
HUGE_PAGE = 2 << 20  # bytes; where they are larger, the advice is refused or does less
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def _madvise() -> Callable[..., Any] | None:
    """The C library's madvise, or None where there is none or the machine's owner wants no huge pages."""
    if sys.platform != "linux":
        return None
    try:
        if "[never]" in SETTING.read_text(encoding="ascii"):
            return None
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None


def _advise(tensor: Tensor, advice: int) -> bool:
    """Whether the kernel took the advice for the whole huge pages within a contiguous CPU tensor's memory."""
    start = tensor.data_ptr()
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    last = (start + tensor.numel() * tensor.element_size()) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise() if first < last else None
    if madvise is None:
        return False
    return bool(madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) == 0)


def expect(tensor: Tensor) -> bool:
    """Have memory that was not yet written come in huge pages, which also saves most of the page faults."""
    return _advise(tensor, MADV_HUGEPAGE)


def gather(tensor: Tensor) -> bool:
    """Move memory that is already there into huge pages (Linux 6.1); at no cost where it lies in such."""
    return _advise(tensor, MADV_COLLAPSE)
