"""Blocks of memory for the large outputs of the CPU's ops, kept for outputs to come.

A layer frees what it has computed and the next one asks for the same sizes. Given back to the system, those pages are
cleared anew each time, a third of a step; and in glibc's heap an aligned block seldom fits the hole that one of its
size has left, so that the heap grows to several times what is used. Here a block that came back serves the next request
of its size, and blocks in use and kept are together never more than the most that were in use at one time: nothing is
held beyond what a step needs anyway.
"""

from __future__ import annotations

import math
import mmap
import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import Parameter

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
        self._lock = Lock()

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
                memory = _pages(size)
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


def _pages(size: int) -> mmap.mmap:
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
    except OSError:  # no memory: what is kept may be in the way, and torch's error is the one that callers know
        BLOCKS.release()
        return x.new_empty(shape)
    return torch.frombuffer(block, dtype=x.dtype, count=count).resize_(shape)  # a view would have a base
