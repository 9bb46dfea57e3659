"""A loop that reads and writes a mapped file chunk by chunk, written without a line of the package: what paging is
measured against. And how fast the disk itself is."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from queue import SimpleQueue

import torch

# include/uapi/asm-generic/mman-common.h, include/uapi/linux/fs.h
MADV_RANDOM, MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE = 1, 4, 14, 23
MAP_SHARED_FIXED, READ_WRITE = 0x11, 3
WRITE, WRITE_AND_WAIT = 2, 7  # flags of sync_file_range
READ_AHEAD = 128 << 10  # bytes; readahead does no more than the device's limit at once
BLOCK = 2 << 20  # bytes of a huge page; the map begins with one
LIBC = ctypes.CDLL(None, use_errno=True)
_OFFSET = ctypes.c_int64
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, _OFFSET)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.readahead.argtypes = (ctypes.c_int, _OFFSET, ctypes.c_size_t)
LIBC.sync_file_range.argtypes = (ctypes.c_int, _OFFSET, _OFFSET, ctypes.c_uint)
LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


class PlainLoop:
    """``run`` adds 1 to every float of a file of ``num_bytes`` in ``folder``.

    The first ``resident`` bytes stay in memory. The others come by chunks: a second thread fetches two ahead of the one
    in work, and releases the one before the last. ``resident`` and ``chunk_bytes`` are multiples of a huge page, in
    which files are read, several times as fast as in small ones, where the file system can.
    """

    def __init__(self, folder: str, num_bytes: int, chunk_bytes: int, resident: int) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as the map)
        self.descriptor = self.file.fileno()
        os.posix_fallocate(self.descriptor, 0, num_bytes)
        self.map = mmap.mmap(-1, num_bytes + BLOCK)  # the addresses
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = -(-begin // BLOCK) * BLOCK
        if LIBC.mmap(self.address, num_bytes, READ_WRITE, MAP_SHARED_FIXED, self.descriptor, 0) != self.address:
            raise OSError(ctypes.get_errno(), "mmap")
        memory = (ctypes.c_ubyte * num_bytes).from_address(self.address)
        self.floats = torch.frombuffer(memory, dtype=torch.float32)
        self.huge = LIBC.madvise(self.address, num_bytes // BLOCK * BLOCK, MADV_HUGEPAGE) == 0
        if self.huge:  # or else the kernel reads ahead by its own measure
            _check(LIBC.madvise(self.address, num_bytes // BLOCK * BLOCK, MADV_RANDOM), "madvise")
        edges = [*range(resident, num_bytes, chunk_bytes), num_bytes]
        self.first = (0, resident)
        self.chunks = list(pairwise(edges))

    def fetch(self, begin: int, end: int) -> None:
        for at in range(end // BLOCK * BLOCK if self.huge else begin, end, READ_AHEAD):
            LIBC.readahead(self.descriptor, at, min(READ_AHEAD, end - at))
        _check(LIBC.madvise(self.address + begin, end - begin, MADV_POPULATE_WRITE), "madvise")

    def start_write(self, begin: int, end: int) -> None:
        _check(LIBC.sync_file_range(self.descriptor, begin, end - begin, WRITE), "sync_file_range")

    def release(self, begin: int, end: int) -> None:
        _check(LIBC.sync_file_range(self.descriptor, begin, end - begin, WRITE_AND_WAIT), "sync_file_range")
        _check(LIBC.madvise(self.address + begin, end - begin, MADV_DONTNEED), "madvise")
        os.posix_fadvise(self.descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def work(self, begin: int, end: int) -> None:
        self.floats[begin // 4 : end // 4].add_(1.0)

    def run(self) -> None:
        fetched: list[threading.Event] = [threading.Event() for _ in self.chunks]
        worked: SimpleQueue[int] = SimpleQueue()

        def move() -> None:
            for number, chunk in enumerate(self.chunks[:2]):
                self.fetch(*chunk)
                fetched[number].set()
            for number in range(len(self.chunks)):
                self.start_write(*self.chunks[worked.get()])
                if number > 0:
                    self.release(*self.chunks[number - 1])
                if number + 2 < len(self.chunks):
                    self.fetch(*self.chunks[number + 2])
                    fetched[number + 2].set()
            if self.chunks:
                self.release(*self.chunks[-1])

        mover = threading.Thread(target=move)
        mover.start()
        self.work(*self.first)
        for number, chunk in enumerate(self.chunks):
            fetched[number].wait()
            self.work(*chunk)
            worked.put(number)
        mover.join()


def resident_bytes(address: int, num_bytes: int) -> int:
    """Bytes of a mapping that are in memory; both arguments are multiples of the page size."""
    pages = num_bytes // mmap.PAGESIZE
    flags = (ctypes.c_ubyte * pages)()
    _check(LIBC.mincore(address, num_bytes, flags), "mincore")
    return int((torch.frombuffer(flags, dtype=torch.uint8) & 1).sum()) * mmap.PAGESIZE


@contextmanager
def largest_resident(address: int, num_bytes: int, seconds: float = 0.02) -> Iterator[list[int]]:
    """Samples resident_bytes while the block runs; the list holds the samples."""
    samples: list[int] = []
    end = threading.Event()

    def sample() -> None:
        while not end.wait(seconds):
            samples.append(resident_bytes(address, num_bytes))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        end.set()
        thread.join()


def disk_rates(folder: str, num_bytes: int = 1 << 30, piece: int = 4 << 20, requests: int = 8) -> dict[str, float]:
    """GB/s of the disk, past the page cache, with several requests under way: written over what was written, then
    read."""
    buffer = mmap.mmap(-1, piece)
    buffer.write(os.urandom(1 << 20) * (piece >> 20))
    seconds = {}
    with tempfile.NamedTemporaryFile(dir=folder) as file, ThreadPoolExecutor(requests) as pool:
        direct = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        landing = [mmap.mmap(-1, piece) for _ in range(requests)]  # of each reader
        try:

            def write(at: int) -> None:
                os.pwrite(direct, buffer, at)

            def read(at: int) -> None:
                os.preadv(direct, [landing[at // piece % requests]], at)

            offsets = range(0, num_bytes, piece)
            list(pool.map(write, offsets))  # blocks that were never written cost the file system more
            os.fsync(direct)
            for name, move in (("write", write), ("read", read)):
                started = time.perf_counter()
                list(pool.map(move, offsets))
                seconds[name] = time.perf_counter() - started
        finally:
            os.close(direct)
    return {f"disk_{name}_gb_per_s": round(num_bytes / value / 1e9, 2) for name, value in seconds.items()}
