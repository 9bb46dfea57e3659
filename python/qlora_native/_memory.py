"""Memory of the process: what is left of each limit, what malloc keeps, what was held at most.

:func:`free_memory` is how many bytes can still be had before an allocation fails or the kernel kills the process: on
Linux the least of: RLIMIT_DATA less the process's private writable memory, the limit of each memory cgroup above the
process (version 2 and 1) less what it holds beyond page cache, and MemAvailable. RLIMIT_AS counts addresses, of which
states in a page file take as many as states in memory: it is left out. The parsers take the files' text.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from qlora_native._buffers import BLOCKS, keep_blocks

NO_LIMIT = 1 << 60  # bytes
# malloc's blocks from these sizes on are mappings of their own, which go back to the system when they are freed. In
# glibc's heap aligned blocks seldom fit holes of their size: with checkpointing it would grow to several times what is
# used.
LEAST_MAPPED, LEAST_MAPPED_WITH_CHECKPOINTING = 8 << 20, 256 << 10


class Free(NamedTuple):
    """What is left of one limit, which ``name`` sets; both in bytes."""

    bytes: int
    limit: int
    name: str

    @property
    def margin(self) -> int:
        """Bytes below which memory is short: a sixteenth of the limit, from 64 MiB to 1 GiB."""
        return min(max(self.limit // 16, 64 << 20), 1 << 30)

    def __str__(self) -> str:
        return f"{self.bytes / 2**20:,.0f} MiB left of {self.name}, {self.limit / 2**20:,.0f} MiB"


def kib_fields(text: str) -> dict[str, int]:
    """The fields of /proc/self/status or /proc/meminfo that are given in kB, in bytes."""
    words = (line.split() for line in text.splitlines())
    return {
        word[0].rstrip(":"): int(word[1]) * 1024
        for word in words
        if len(word) == 3 and word[2] == "kB"
    }


def free_of_data_limit(status: str, limit: int) -> Free:
    """What RLIMIT_DATA leaves."""
    return Free(max(0, limit - kib_fields(status)["VmData"]), limit, "RLIMIT_DATA")


def free_of_machine(meminfo: str) -> Free:
    """What the machine has, page cache that can be dropped counted as free."""
    fields = kib_fields(meminfo)
    return Free(fields["MemAvailable"], fields["MemTotal"], "the machine's memory")


def cgroup_limit(texts: Iterable[str]) -> int | None:
    """Bytes, from memory.max and memory.high, or memory.limit_in_bytes; None for more than any machine has."""
    limit = min((int(text) for text in texts if text.strip() != "max"), default=NO_LIMIT)
    return None if limit >= NO_LIMIT else limit


def free_of_cgroup(limit: int, held: str, stat: str) -> Free:
    """What a cgroup leaves, by memory.current or memory.usage_in_bytes (``held``) and memory.stat. File pages, written
    back or not, are given up before anything is killed."""
    counts = {
        name: int(value) for name, _, value in (line.partition(" ") for line in stat.splitlines())
    }
    # Version 1 has a line with the cgroups below, too.
    prefix = "total_" if "total_inactive_file" in counts else ""
    cache = sum(counts.get(f"{prefix}{name}_file", 0) for name in ("inactive", "active"))
    return Free(max(0, limit - max(0, int(held) - cache)), limit, "the memory cgroup")


def cgroup_folders(cgroup: str, mountinfo: str) -> list[tuple[int, str]]:
    """The process's memory cgroups as (version, folder), its own first, then those above it as far as they are seen;
    from the texts of /proc/self/cgroup and /proc/self/mountinfo."""
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
        parts = (
            group.relative_to(top).parts
            if group.is_relative_to(top) and ".." not in group.parts
            else ()
        )
        found += [
            (version, str(PurePosixPath(point, *parts[:depth]))) for depth in range(len(parts), -1, -1)
        ]
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


CGROUP_FILES = {1: ("usage_in_bytes", "limit_in_bytes"), 2: ("current", "max", "high")}


@lru_cache(maxsize=1)
def _cgroups() -> list[tuple[list[str], str, str]]:
    """Of each cgroup the files of its limits, of what it holds, and memory.stat; a version 2 root has none of them."""
    found = []
    for version, folder in cgroup_folders(_read("/proc/self/cgroup"), _read("/proc/self/mountinfo")):
        held, *limits = (f"{folder}/memory.{name}" for name in CGROUP_FILES[version])
        if Path(held).exists():
            found.append((limits, held, f"{folder}/memory.stat"))
    return found


def _read(file: str) -> str:
    return Path(file).read_text(encoding="ascii", errors="replace")


def _free_of_process() -> Iterator[Free]:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        yield free_of_data_limit(_read("/proc/self/status"), limit)


def _free_of_cgroups() -> Iterator[Free]:
    for limits, held, stat in _cgroups():
        if (limit := cgroup_limit(map(_read, limits))) is not None:
            yield free_of_cgroup(limit, _read(held), _read(stat))


def free_memory() -> Free | None:
    """The limit of this process that leaves least; None where no limit can be read (no procfs).

    Blocks that the ops keep count as used while there is enough; when it is short, they are given back first.
    """
    free = _least_free()
    if free is not None and free.bytes < free.margin:
        BLOCKS.release()
        free = _least_free()
    return free


def _least_free() -> Free | None:
    found: list[Free] = []
    for source in (
        _free_of_process,
        _free_of_cgroups,
        lambda: [free_of_machine(_read("/proc/meminfo"))],
    ):
        try:
            found += source()
        except (ImportError, OSError, ValueError, KeyError):
            continue  # this kernel does not have the file
    return min(found, default=None)


def free_of_device(
    free: int, total: int, fraction: float = 1.0, reserved: int = 0, allocated: int = 0
) -> Free:
    """What torch can still hand out on a CUDA device, of whose ``total`` this process may take ``fraction``: torch has
    ``reserved`` bytes of it, of which tensors hold ``allocated``."""
    limit = min(total, int(fraction * total))
    return Free(
        max(0, min(free, limit - reserved)) + reserved - allocated, limit, "the device's memory"
    )


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device that are free, and all of them.

    Where they are the host's memory (Jetson, GB10), the driver counts page cache as used, which Linux gives up when
    somebody asks: there MemAvailable counts, if it is more.
    """
    from qlora_native.ops import _cuda_kernels

    free, total = _cuda_kernels.memory(device)
    if _cuda_kernels.facts(device).is_integrated:
        with suppress(OSError, KeyError, ValueError):
            free = min(total, max(free, free_of_machine(_read("/proc/meminfo")).bytes))
    return free, total


def free_device_memory(device: torch.device) -> Free:
    """The same for a device that runs the CUDA kernels; the emulator has no allocator of torch's."""
    free, total = device_memory(device)
    if device.type != "cuda":
        return free_of_device(free, total)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return free_of_device(free, total, fraction, reserved, allocated)


def trim_heap() -> None:
    """Return freed heap to the system, and blocks that the ops keep: glibc keeps it, and tensors of many sizes leave
    holes between them."""
    BLOCKS.release()
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


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters (glibc, malloc.h)
USER_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory(checkpointing: bool = False) -> bool:
    """Have glibc and the ops hold on to freed memory; False without glibc. Where the user has set malloc's variables
    nothing is kept, and False returned.

    Each step frees what it kept for backward and asks for the same sizes again; given back, these pages are fetched and
    cleared anew, tens of thousands a step. The ops' large outputs are kept as blocks (_buffers.py). Of the
    rest large blocks come and go: with ``checkpointing``, which is there to save memory, from 256 KiB on, otherwise
    from 8 MiB.
    """
    if any(name in os.environ for name in USER_SETTINGS):
        return False
    keep_blocks()
    mallopt = _libc("mallopt")
    if mallopt is None:
        return False
    least = LEAST_MAPPED_WITH_CHECKPOINTING if checkpointing else LEAST_MAPPED
    return bool(mallopt(MMAP_THRESHOLD, least) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Leave out of garbage collection what is alive now: hundreds of thousands of objects, several times a step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
