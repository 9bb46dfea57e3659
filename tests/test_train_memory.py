"""keep_freed_memory: done under glibc, in a process of its own, and not against the user's settings."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from qlora_native._memory import USER_SETTINGS, keep_freed_memory

FAULTS = """
import ctypes, resource, sys, torch
from qlora_native._memory import keep_freed_memory

libc = ctypes.CDLL(None)
PR_SET_THP_DISABLE, M_MMAP_THRESHOLD = 41, -3
libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # one fault a small page, however free memory is scattered
if sys.argv[1] == "kept":
    assert keep_freed_memory()
else:
    # glibc's first threshold, held: else it grows at the first free, and what then goes back depends on the heap's top.
    libc.mallopt(M_MMAP_THRESHOLD, 128 << 10)
for step in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 20) for _ in range(30)]  # 4 MiB each
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is configured")
def test_the_same_sizes_are_had_without_new_pages() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], env=environment, capture_output=True).stdout)
        for how in ("given back", "kept")
    }
    assert faults["given back"] > 5_000  # of 30,720 pages
    assert faults["kept"] < 500


def test_the_users_settings_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USER_SETTINGS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not keep_freed_memory()
