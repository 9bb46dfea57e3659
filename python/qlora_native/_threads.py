"""Lets OpenMP's threads sleep, in place of spinning, while other programs want the CPUs.

By default libgomp's threads spin 300,000 turns while they wait for each other: on an idle machine that is faster than
sleeping, but beside a program on each core it is several times slower (bench/bench_busy.py).
With more threads in teams than CPUs it takes 100 turns (libgomp's manual, GOMP_SPINCOUNT), at once and until they are
fewer again. So while threads of this process wait for a CPU, a second team is kept, which does nothing. It alone has
more threads than there are CPUs, however many torch has at that moment: one while a model is calibrated.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

# Share of its time that the thread which waits most for a CPU does: above the first all sleep, below the second they
# spin again. Measured on two cores: 0.03 at most if idle, 0.27 at least beside one spinning program or two.
BUSY, IDLE = 0.1, 0.05
SECONDS = 1.0  # between two looks, which take 0.02 ms a thread
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # by who set one


def sleep_while_busy() -> None:
    """From now on, where /proc tells it (Linux); nothing with one thread, or where the environment has chosen."""
    if torch.get_num_threads() > 1 and not any(name in os.environ for name in CHOSEN):
        _start(os.getpid())


@cache
def _start(_pid: int) -> None:  # a forked process has no thread of its parent's
    threading.Thread(target=_watch, name="qlora_native: busy CPUs", daemon=True).start()


def _waited() -> dict[str, float]:
    """Seconds that each thread of this process has waited for a CPU so far."""
    seconds = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # of a thread that has ended
            seconds[file.parent.name] = int(file.read_text(encoding="ascii").split()[1]) / 1e9
    return seconds


def _watch() -> None:
    is_idle, before = threading.Event(), _waited()
    is_idle.set()
    while before:
        time.sleep(SECONDS)
        now = _waited()
        share = (
            max((waited - before.get(thread, 0.0) for thread, waited in now.items()), default=0.0)
            / SECONDS
        )
        before = now
        if is_idle.is_set() and share > BUSY:
            is_idle.clear()
            threading.Thread(target=_second_team, args=(is_idle,), daemon=True).start()
        elif share < IDLE:
            is_idle.set()


def _second_team(is_idle: threading.Event) -> None:
    runtime = ctypes.CDLL(torch._C.__file__)  # and what torch is linked with
    with suppress(AttributeError):  # another OpenMP than GCC's
        runtime.GOMP_parallel(runtime.getpid, None, (os.cpu_count() or 1) + 1, 0)
    is_idle.wait()
