"""Memory of the process: what is left of each limit, what malloc keeps, what was held at most.

:func:`free_memory` is how many bytes can still be had before an allocation fails or the kernel kills the process: on
Linux the least of: RLIMIT_DATA less the process's private writable memory, the limit of each memory cgroup above the
process (version 2 and 1) less what it holds beyond page cache, and MemAvailable. RLIMIT_AS is left out on purpose: it
counts addresses, of which states in a page file take as many as states in memory. The parsers are functions of the
files' text.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

NO_LIMIT = 1 << 60  # bytes
# Blocks from these sizes on are mappings of their own, which go back to the system when they are freed. glibc seldom
# finds an aligned block a place in a hole of its size, so that the heap grows beyond what is used: by a fifth without
# checkpointing, where most is kept anyway; to several times as much with it, where layer after layer comes and goes.
LEAST_MAPPED, LEAST_MAPPED_WITH_CHECKPOINTING = 8 << 20, 256 << 10


class Free(NamedTuple):
    """What is left of one limit."""

    bytes: int
    limit: int  # bytes
    name: str  # what sets the limit, for messages

    @property
    def margin(self) -> int:
        """Bytes below which memory is short: a sixteenth of the limit, from 64 MiB to 1 GiB."""
        return min(max(self.limit // 16, 64 << 20), 1 << 30)

    def __str__(self) -> str:
        return f"{self.bytes / 2**20:,.0f} MiB left of {self.name}, {self.limit / 2**20:,.0f} MiB"


def kib_fields(text: str) -> dict[str, int]:
    """The fields of /proc/self/status or /proc/meminfo that are given in kB, in bytes."""
    words = (line.split() for line in text.splitlines())
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words if len(word) == 3 and word[2] == "kB"}


def free_of_data_limit(status: str, limit: int) -> Free | None:
    """What RLIMIT_DATA leaves; ``limit`` is negative where there is none (resource.RLIM_INFINITY)."""
    held = kib_fields(status).get("VmData")
    return None if limit < 0 or held is None else Free(max(0, limit - held), limit, "RLIMIT_DATA")


def free_of_machine(meminfo: str) -> Free | None:
    """What the machine has, page cache that can be dropped counted as free."""
    fields = kib_fields(meminfo)
    if "MemAvailable" not in fields:
        return None
    return Free(fields["MemAvailable"], fields["MemTotal"], "the machine's memory")


def cgroup_limit(texts: Iterable[str]) -> int | None:
    """Bytes, from the texts of memory.max and memory.high, or of memory.limit_in_bytes; None for "max" and for more
    than any machine has."""
    limit = min((int(text) for text in texts if text.strip() != "max"), default=NO_LIMIT)
    return None if limit >= NO_LIMIT else limit


def free_of_cgroup(limit: int, held: str, stat: str) -> Free:
    """What one cgroup leaves.

    Args:
        limit: in bytes.
        held: text of memory.current or memory.usage_in_bytes.
        stat: text of memory.stat. Its file pages, written back or not, are given up before anything is killed.
    """
    counts = {name: int(value) for name, _, value in (line.partition(" ") for line in stat.splitlines())}
    prefix = "total_" if "total_inactive_file" in counts else ""  # version 1 has a line with the cgroups below, too
    cache = sum(counts.get(f"{prefix}{name}_file", 0) for name in ("inactive", "active"))
    return Free(max(0, limit - max(0, int(held) - cache)), limit, "the memory cgroup")


def cgroup_folders(cgroup: str, mountinfo: str) -> list[tuple[int, str]]:
    """The process's memory cgroups as (version, folder), its own first, then those above it as far as they are seen.

    Args:
        cgroup: text of /proc/self/cgroup.
        mountinfo: text of /proc/self/mountinfo.
    """
    own: dict[int, str] = {}
    for line in cgroup.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            own[2] = path
        elif "memory" in controllers.split(","):
            own[1] = path
    found: list[tuple[int, str]] = []
    for line in mountinfo.splitlines():
        place, _, kind = line.partition(" - ")
        root, point = place.split()[3:5]
        filesystem, _, options = kind.split(" ", 2)
        version = {"cgroup2": 2, "cgroup": 1}.get(filesystem)
        if version not in own or (version == 1 and "memory" not in options.split(",")):
            continue
        group, top = PurePosixPath(own.pop(version)), PurePosixPath(root)
        # In a container the path may be the host's, and then the mount point is the process's own cgroup.
        parts = group.relative_to(top).parts if group.is_relative_to(top) and ".." not in group.parts else ()
        found += [(version, str(PurePosixPath(point, *parts[:depth]))) for depth in range(len(parts), -1, -1)]
    return found


def file_system(path: str, mountinfo: str) -> str:
    """The type of the file system that a path without links lies in; "" if no mount point is above it."""
    best, found = PurePosixPath(), ""
    for line in mountinfo.splitlines():
        place, _, kind = line.partition(" - ")
        point = PurePosixPath(place.split()[4].replace("\\040", " "))
        # Of two mounts in one place the later one lies on top.
        if PurePosixPath(path).is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, found = point, kind.split(" ", 1)[0]
    return found


def file_system_of(folder: Path) -> str:
    """The same for a folder of this machine; "" where that cannot be read."""
    try:
        return file_system(str(folder.resolve()), _read("/proc/self/mountinfo"))
    except OSError:
        return ""


CGROUP_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    2: (("memory.max", "memory.high"), "memory.current"),
}


@lru_cache(maxsize=1)
def _cgroups() -> list[tuple[list[str], str, str]]:
    """Of each cgroup the files of its limits, of what it holds, and memory.stat; a version 2 root has none of them."""
    found = []
    for version, folder in cgroup_folders(_read("/proc/self/cgroup"), _read("/proc/self/mountinfo")):
        limits, held = CGROUP_FILES[version]
        if Path(folder, held).exists():
            found.append(([f"{folder}/{name}" for name in limits], f"{folder}/{held}", f"{folder}/memory.stat"))
    return found


def _read(file: str) -> str:
    return Path(file).read_text(encoding="ascii", errors="replace")


def _of_process() -> Iterator[Free | None]:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        yield free_of_data_limit(_read("/proc/self/status"), limit)


def _of_cgroups() -> Iterator[Free | None]:
    for limits, held, stat in _cgroups():
        limit = cgroup_limit(map(_read, limits))
        if limit is not None:
            yield free_of_cgroup(limit, _read(held), _read(stat))


def _of_machine() -> Iterator[Free | None]:
    yield free_of_machine(_read("/proc/meminfo"))


def free_memory() -> Free | None:
    """The limit of this process that leaves least; None where no limit can be read (no procfs)."""
    found: list[Free] = []
    for source in (_of_process, _of_cgroups, _of_machine):
        try:
            found += filter(None, source())
        except (ImportError, OSError, ValueError, KeyError):
            continue  # this kernel does not have the file
    return min(found, default=None)


def free_of_device(free: int, total: int, fraction: float = 1.0, reserved: int = 0, allocated: int = 0) -> Free:
    """What torch can still hand out on a CUDA device.

    Args:
        free, total: of the device, in bytes, from cudaMemGetInfo.
        fraction: share of ``total`` that this process may take.
        reserved, allocated: bytes that torch took from the device, and those of them that tensors hold.
    """
    limit = min(total, int(fraction * total))
    return Free(max(0, min(free, limit - reserved)) + reserved - allocated, limit, "the device's memory")


def free_device_memory(device: torch.device) -> Free:
    """The same for a device that runs the CUDA kernels; the emulator has no allocator of torch's."""
    from qlora_native.ops import _cuda_kernels

    free, total = _cuda_kernels.memory(device)
    if device.type != "cuda":
        return free_of_device(free, total)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return free_of_device(
        free, total, fraction, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    )


def trim_heap() -> None:
    """Return freed heap to the system: glibc keeps it, and tensors of many sizes leave holes between them."""
    if (malloc_trim := _libc("malloc_trim")) is not None:
        malloc_trim(0)


def _libc(name: str) -> Any:
    """A function of the C library; None where there is none, as without glibc."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


def release_free_memory() -> None:
    """Return to the system what malloc and torch keep for later: it counts against the limits as if it were in use."""
    trim_heap()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes; 0 where the system has no record of it."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


# mallopt's parameters (glibc, malloc.h)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory(checkpointing: bool = False) -> bool:
    """Have glibc hold on to freed memory instead of giving it back to the system.

    Each step frees what it kept for backward and asks for the same sizes again; given back, these pages are fetched and
    cleared anew, tens of thousands a step. Large blocks still come and go: with ``checkpointing``, which is there to
    save memory, from 256 KiB on, otherwise from 8 MiB.

    Returns:
        Whether it was done: not without glibc, nor where the user has set malloc's variables.
    """
    mallopt = _libc("mallopt")
    if mallopt is None or any(name in os.environ for name in USER_SETTINGS):
        return False
    least = LEAST_MAPPED_WITH_CHECKPOINTING if checkpointing else LEAST_MAPPED
    return bool(mallopt(MMAP_THRESHOLD, least) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Leave out what is alive now whenever Python collects garbage: model, optimizer and libraries, hundreds of
    thousands of objects, would be traversed several times a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
