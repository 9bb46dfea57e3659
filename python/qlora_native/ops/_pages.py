"""Where large weights lie: in huge pages, and spread over NUMA nodes.

A product of one token reads a weight once, from end to end. With pages of 4 KiB the processor looks up an address a
row or two, in a virtual machine through two tables. On a machine of several NUMA nodes, a weight that one thread wrote
lies on one of them, whose memory all threads then share.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
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
# include/uapi/linux/mempolicy.h, and the numbers of mbind among the system calls
MPOL_INTERLEAVE, MPOL_MF_MOVE = 3, 2
MBIND = {"x86_64": 237, "aarch64": 235}
NODES = Path("/sys/devices/system/node/online")


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


@cache
def nodes() -> tuple[int, ...]:
    """The machine's NUMA nodes; empty where the system does not list them."""
    try:
        parts = [part.split("-") for part in NODES.read_text(encoding="ascii").strip().split(",")]
        return tuple(node for part in parts for node in range(int(part[0]), int(part[-1]) + 1))
    except (OSError, ValueError):
        return ()


def interleave(tensor: Tensor, over: tuple[int, ...] | None = None) -> bool:
    """Spread the pages of a contiguous CPU tensor over NUMA nodes in turns, those that are there already too.

    Nothing is done for memory within one page, nor, unless ``over`` names nodes, on a machine with one node. Returns
    whether the kernel took it.
    """
    over = nodes() if over is None and len(nodes()) > 1 else over
    number = MBIND.get(platform.machine())
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if not over or number is None or sys.platform != "linux" or first >= last:
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in over))
    arguments = (number, first, last - first, MPOL_INTERLEAVE, ctypes.addressof(mask), 8 * ctypes.sizeof(mask))
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments), ctypes.c_long(MPOL_MF_MOVE)) == 0)


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
    """Have memory that was not yet written come in huge pages, which also saves most of the page faults, and from all
    NUMA nodes."""
    interleave(tensor)
    return _advise(tensor, MADV_HUGEPAGE)


def gather(tensor: Tensor) -> bool:
    """Move memory that is already there into huge pages (Linux 6.1); at no cost where it lies in such."""
    return _advise(tensor, MADV_COLLAPSE)
