"""Keeping the memory of one training step for the next one."""

from __future__ import annotations

import ctypes
import os

# mallopt's parameters (glibc, malloc.h)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc to hold on to freed memory instead of giving it back to the system.

    Each step frees what it kept for backward and asks for the same sizes again; given back, these pages are fetched and
    cleared anew, tens of thousands a step. The peak does not change: it is reached in every step. Tensors of 32 MiB and
    more still come and go.

    Returns:
        Whether it was done: not without glibc, nor where the user set malloc's variables himself.
    """
    if any(name in os.environ for name in USER_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
