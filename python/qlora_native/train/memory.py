"""Keeping the memory of one training step for the next one, and Python's garbage collector off what stays."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_native.optim.free_memory import LEAST_MAPPED, LEAST_MAPPED_WITH_CHECKPOINTING

# mallopt's parameters (glibc, malloc.h)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory(checkpointing: bool = False) -> bool:
    """Tell glibc to hold on to freed memory instead of giving it back to the system.

    Each step frees what it kept for backward and asks for the same sizes again; given back, these pages are fetched and
    cleared anew, tens of thousands a step. Large blocks still come and go: with ``checkpointing``, which is there to
    save memory, from 256 KiB on, otherwise from 8 MiB.

    Returns:
        Whether it was done: not without glibc, nor where the user set malloc's variables himself.
    """
    if any(name in os.environ for name in USER_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    least = LEAST_MAPPED_WITH_CHECKPOINTING if checkpointing else LEAST_MAPPED
    return bool(mallopt(MMAP_THRESHOLD, least) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Leave out what is alive now whenever Python collects garbage: model, optimizer and libraries, hundreds of
    thousands of objects, would be looked at several times a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
