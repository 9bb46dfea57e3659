"""Memory for the ops on a CPU: a scratch buffer, blocks that serve one large output after the other, huge pages."""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
import sys
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import Parameter

_scratch = threading.local()


def _grown(num_bytes: int) -> Tensor:
    held: Tensor | None = getattr(_scratch, "buffer", None)
    if held is None or held.numel() < num_bytes:
        with torch.inference_mode(False):
            held = torch.empty(num_bytes, dtype=torch.uint8)
        _scratch.buffer = held
    return held


def scratch(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor [count] in this thread's reusable buffer: no page faults after the first call.

    Valid until the thread's next call. The buffer only grows, up to the largest size asked for.
    """
    num_bytes = count * dtype.itemsize
    return _grown(num_bytes)[:num_bytes].view(dtype)


def buffer(num_bytes: int) -> tuple[int, int]:
    """Address and size in bytes of the same buffer, which holds ``num_bytes`` at least."""
    held = _grown(num_bytes)
    return held.data_ptr(), held.numel()


# Blocks of memory for the large outputs of the CPU's ops, kept for outputs to come.
# A layer frees what it has computed and the next one asks for the same sizes. Given back to the system, those pages are
# cleared anew each time, and in glibc's heap an aligned block seldom fits the hole that one of its
# size has left, so that the heap grows to several times what is used. Here a block that came back serves the next
# request of its size, and blocks in use and kept are together never more than the most that were in use at one time:
# nothing is held beyond what a step needs anyway.

LEAST = 256 << 10  # bytes of an output; smaller ones are malloc's
PAGE = 4096
SPARE = 4  # a block serves requests that leave at most a quarter of their own size unused


class Kept(NamedTuple):
    """A free block; of one size, the one that came back last stands first."""

    size: int
    age: int  # counts down
    memory: mmap.mmap


class Blocks:
    """Lends blocks; ``used`` and ``kept`` are bytes lent and free, ``most`` the most that were lent at one time."""

    def __init__(self) -> None:
        self.used = self.kept = self.most = 0
        self._age = 0
        self._free: list[Kept] = []  # in order
        # Blocks come back from the garbage collector, in the midst of anything: they wait here for the next request.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> memoryview:
        """At least so many bytes, uninitialized, at the begin of a page; they are lent as long as the view lives."""
        size = -(-num_bytes // PAGE) * PAGE
        with self._lock:
            self._take_back()
            at = bisect_left(self._free, (size,))
            if at < len(self._free) and self._free[at].size <= size + size // SPARE:
                memory = self._free.pop(at).memory
                self.kept -= len(memory)
            else:
                self._drop(self.most - self.used - size)
                memory = _mapped(size)
            self.used += len(memory)
            self.most = max(self.most, self.used)
        view = memoryview(memory)
        finalize(view, self._returned.append, memory).atexit = False
        return view

    def release(self) -> None:
        """Give free blocks to the system, and forget how many were lent."""
        with self._lock:
            self._take_back()
            self._drop(0)
            self.most = self.used

    def _take_back(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._age -= 1
            insort(self._free, Kept(len(memory), self._age, memory))
            self.used -= len(memory)
            self.kept += len(memory)

    def _drop(self, limit: int) -> None:
        """Give back those that were free for longest, until no more than ``limit`` bytes are kept."""
        while self._free and self.kept > limit:
            oldest = max(self._free, key=lambda block: block.age)
            self._free.remove(oldest)
            self.kept -= oldest.size


def _mapped(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


BLOCKS = Blocks()
_are_kept = False


def keep_blocks() -> None:
    """From now on :func:`empty_like` takes large tensors from ``BLOCKS``: for a process that trains."""
    global _are_kept
    _are_kept = True


def empty_like(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """An uninitialized contiguous tensor of x's dtype, device and shape, or of another shape.

    Large ones on the CPU lie in blocks that are kept, if that was asked for. Those of tracers have no memory.
    """
    shape = x.shape if shape is None else shape
    if not _are_kept or type(x) not in (Tensor, Parameter) or x.device.type != "cpu":
        return x.new_empty(shape)
    count = math.prod(shape)
    num_bytes = count * x.dtype.itemsize
    if num_bytes < LEAST:
        return x.new_empty(shape)
    try:
        block = BLOCKS.lend(num_bytes)
    # No memory: what is kept may be in the way, and torch's error is the one that callers know.
    except OSError:
        BLOCKS.release()
        return x.new_empty(shape)
    # A view would have a base.
    return torch.frombuffer(block, dtype=x.dtype, count=count).resize_(shape)


# Large weights lie in huge pages, and are spread over NUMA nodes: a product of one token reads a weight once, from end
# to end. With pages of 4 KiB the processor translates an address for every row or two; and a weight that one thread
# wrote lies on one node, whose memory all threads then share.

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
    """The C library's madvise, or None where there is none or huge pages are disabled."""
    try:
        enabled = sys.platform == "linux" and "[never]" not in SETTING.read_text(encoding="ascii")
        return ctypes.CDLL(None).madvise if enabled else None
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
    """Spread the pages of a contiguous CPU tensor, present or not, over NUMA nodes in turns; whether the kernel did.

    Nothing is done for memory within one page, nor, unless ``over`` names nodes, on a machine with one node.
    """
    over = nodes() if over is None and len(nodes()) > 1 else over
    number = MBIND.get(platform.machine())
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if not over or number is None or sys.platform != "linux" or first >= last:
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in over))
    arguments = (
        number,
        first,
        last - first,
        MPOL_INTERLEAVE,
        ctypes.addressof(mask),
        8 * ctypes.sizeof(mask),
    )
    return bool(
        ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments), ctypes.c_long(MPOL_MF_MOVE)) == 0
    )


def _advise(tensor: Tensor, advice: int) -> bool:
    """Whether the kernel took the advice for the whole huge pages within a contiguous CPU tensor's memory."""
    start = tensor.data_ptr()
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    last = (start + tensor.numel() * tensor.element_size()) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise() if first < last else None
    return (
        madvise is not None
        and madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) == 0
    )


def expect_pages(tensor: Tensor) -> bool:
    """Have memory that was not yet written come in huge pages, with fewer page faults, and from all NUMA nodes."""
    interleave(tensor)
    return _advise(tensor, MADV_HUGEPAGE)


def gather_pages(tensor: Tensor) -> bool:
    """Move memory that is already there into huge pages (Linux 6.1); at no cost where it lies in such."""
    return _advise(tensor, MADV_COLLAPSE)
