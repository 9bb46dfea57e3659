"""What is free, from texts as Linux writes them and against what mmap grants; when states move, and who moves them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch

from qlora_native import _memory, errors
from qlora_native._memory import Free
from qlora_native.ops import _cuda_kernels
from qlora_native.optim import pressure
from qlora_native.optim.pressure import PagingPolicy

MIB, GIB = 1 << 20, 1 << 30
STATUS = "Name:\tpython\nState:\tR (running)\nVmSize:\t 5195304 kB\nVmData:\t 1000000 kB\nThreads:\t3\n"
MEMINFO = "MemTotal:  24590000 kB\nMemFree:  1000000 kB\nMemAvailable:  20000000 kB\nHugePages_Total:  0\n"


def test_the_limits_of_the_process_and_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free = _memory.free_of_data_limit(STATUS, 2_000_000 * 1024)
    assert free == Free(1_000_000 * 1024, 2_000_000 * 1024, "RLIMIT_DATA")
    assert _memory.free_of_data_limit(STATUS, 1024).bytes == 0  # a limit set below what is held already
    assert _memory.free_of_machine(MEMINFO) == Free(20_000_000 * 1024, 24_590_000 * 1024, "the machine's memory")
    monkeypatch.setattr(_memory, "_cgroups", list)
    monkeypatch.setattr(_memory, "_read", lambda file: "MemTotal: 5 kB\n")  # before Linux 3.14
    for limit in (-1, 1024):  # none, and one that nothing is read of
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        assert _memory.free_memory() is None


V2_STAT = f"anon {500 * MIB}\nfile {300 * MIB}\ninactive_file {200 * MIB}\nactive_file {50 * MIB}\nshmem {50 * MIB}\n"
V1_STAT = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {70 * MIB}\ntotal_active_file {30 * MIB}\n"


@pytest.mark.parametrize(
    ("held", "stat", "free"),
    [
        (800 * MIB, V2_STAT, GIB - 800 * MIB + 250 * MIB),
        (100 * MIB, V2_STAT, GIB),  # cache alone, read a moment later
        (2 * GIB, V2_STAT, 0),
        (600 * MIB, V1_STAT, GIB - 500 * MIB),
    ],
)
def test_a_cgroup(held: int, stat: str, free: int) -> None:
    assert _memory.free_of_cgroup(GIB, f"{held}\n", stat) == Free(free, GIB, "the memory cgroup")


@pytest.mark.parametrize(
    ("texts", "limit"),
    [
        ([f"{GIB}\n", "max\n"], GIB),
        ([f"{GIB}\n", f"{900 * MIB}\n"], 900 * MIB),  # memory.high, above which a process is slowed down
        (["max\n", "max\n"], None),
        (["9223372036854771712\n"], None),
    ],
)
def test_the_limit_of_a_cgroup(texts: list[str], limit: int | None) -> None:
    assert _memory.cgroup_limit(texts) == limit


MOUNTS_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n22 1 8:1 / / rw - ext4 /dev/sda rw\n"
MOUNTS_BOTH = """\
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
MOUNTS_DOCKER = "42 40 0:32 /docker/abc /sys/fs/cgroup/memory ro master:9 - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "folders"),
    [
        ("0::/user/1.scope\n", MOUNTS_V2, [(2, f"/sys/fs/cgroup{p}") for p in ("/user/1.scope", "/user", "")]),
        ("0::/\n", MOUNTS_V2, [(2, "/sys/fs/cgroup")]),  # a container with a cgroup namespace
        ("0::/../other\n", MOUNTS_V2, [(2, "/sys/fs/cgroup")]),  # a process moved out of its namespace's root
        (
            "5:devices:/\n4:memory:/jobs/7\n0::/\n",
            MOUNTS_BOTH,
            [*((1, f"/sys/fs/cgroup/memory{p}") for p in ("/jobs/7", "/jobs", "")), (2, "/sys/fs/cgroup/unified")],
        ),
        ("4:cpuset,memory:/docker/abc\n", MOUNTS_DOCKER, [(1, "/sys/fs/cgroup/memory")]),
        ("4:memory:/docker/abc/inner\n", MOUNTS_DOCKER, [(1, f"/sys/fs/cgroup/memory{p}") for p in ("/inner", "")]),
        ("4:memory:/elsewhere\n", MOUNTS_DOCKER, [(1, "/sys/fs/cgroup/memory")]),
        ("1:name=systemd:/\n", MOUNTS_BOTH, []),
    ],
)
def test_where_the_cgroups_are(cgroup: str, mountinfo: str, folders: list[tuple[int, str]]) -> None:
    assert _memory.cgroup_folders(cgroup, mountinfo) == folders


def test_the_file_system_of_a_path() -> None:
    mounts = (
        "21 1 8:1 / / rw - ext4 /dev/sda rw\n"
        "24 21 0:5 / /dev/shm rw - tmpfs shm rw\n"
        "25 21 8:2 / /mnt/my\\040disk rw shared:1 - xfs /dev/sdb rw\n"
        "26 21 0:6 / /dev/shm rw - ramfs shm rw\n"
    )
    found = [_memory.file_system(path, mounts) for path in ("/dev/shm/a", "/dev/shmem", "/", "/mnt/my disk/b")]
    assert found == ["ramfs", "ext4", "ext4", "xfs"]
    assert _memory.file_system("/a", "") == ""


def test_a_device() -> None:
    """8 GiB, of which another process holds 2, torch 3 with 1 of them in tensors."""
    assert _memory.free_of_device(3 * GIB, 8 * GIB, 1.0, 3 * GIB, GIB).bytes == 5 * GIB
    half = _memory.free_of_device(3 * GIB, 8 * GIB, 0.5, 3 * GIB, GIB)
    assert half == Free(3 * GIB, 4 * GIB, "the device's memory")


def test_the_margin_grows_with_the_limit() -> None:
    assert [Free(0, limit, "").margin for limit in (GIB // 2, 4 * GIB, 64 * GIB)] == [64 * MIB, 256 * MIB, GIB]
    assert str(Free(3 * MIB, GIB, "RLIMIT_DATA")) == "3 MiB left of RLIMIT_DATA, 1,024 MiB"


GRANTED = """
import mmap, resource
from qlora_native._memory import free_memory

MIB = 1 << 20
before = free_memory()
assert before.name != "RLIMIT_DATA", before
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + 256 * MIB,) * 2)
free = free_memory()
assert free.name == "RLIMIT_DATA" and free.limit == held + 256 * MIB, free
assert 200 * MIB < free.bytes <= 256 * MIB, free
mmap.mmap(-1, free.bytes - 8 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
try:
    mmap.mmap(-1, free.bytes + 8 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
except OSError:
    print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_free_is_what_the_system_grants() -> None:
    done = subprocess.run([sys.executable, "-c", GRANTED], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def left(mib: int) -> Free:
    return Free(mib * MIB, GIB, "a test")  # of 1 GiB: the margin is 64 MiB


class States:
    """100 MiB of states without any memory: what moves them and when."""

    def __init__(self, in_memory: int = 100 * MIB) -> None:
        self.here, self.there, self.moves = in_memory, 0, list[str]()

    def states_in_memory(self) -> int:
        return self.here

    def states_paged_out(self) -> int:
        return self.there

    def page_out(self) -> None:
        self.moves.append("out")
        self.here, self.there = 0, self.here + self.there

    def page_in(self) -> None:
        self.moves.append("in")
        self.here, self.there = self.here + self.there, 0


def play(free: Callable[[int], int], seconds: int, policy: PagingPolicy, states: States) -> list[tuple[int, str]]:
    """One decision a second; the seconds at which states move."""
    moves: list[tuple[int, str]] = []
    for now in range(seconds):
        if move := policy.decide(float(now), left(free(now)), states.here, states.there):
            getattr(states, f"page_{move}")()
            moves.append((now, move))
    return moves


RARE = [(at + delay, move) for at in range(5, 1000, 100) for delay, move in ((0, "out"), (11, "in"))]


@pytest.mark.parametrize(
    ("free", "seconds", "moves"),
    [
        pytest.param(lambda now: 50 if now == 7 else 500, 40, [(7, "out"), (18, "in")], id="back after a calm"),
        pytest.param(lambda now: 50 if now == 7 else 163, 100, [(7, "out")], id="no room for both"),
        pytest.param(lambda now: 50 if now == 7 else 164, 100, [(7, "out"), (18, "in")], id="just enough room"),
        pytest.param(lambda now: 120 if now % 8 == 5 else 500, 400, [], id="steps with spikes that fit"),
        pytest.param(lambda now: 40 if now % 8 == 5 else 500, 400, [(5, "out")], id="steps with larger spikes"),
        pytest.param(
            lambda now: 40 if now % 15 == 5 else 500, 3000, [(5, "out"), (16, "in"), (20, "out")],
            id="back too early",
        ),
        pytest.param(lambda now: 40 if now % 100 == 5 else 500, 1000, RARE, id="spikes that are rare"),
    ],
)  # fmt: skip
def test_when_states_move(free: Callable[[int], int], seconds: int, moves: list[tuple[int, str]]) -> None:
    assert play(free, seconds, PagingPolicy(calm=10, longest=40), States()) == moves
    assert play(free, seconds, PagingPolicy(calm=10, longest=40), States(in_memory=0)) == []


def test_states_that_the_loop_moved_out_wait_for_a_calm_too() -> None:
    policy, states = PagingPolicy(calm=10), States()
    assert play(lambda now: 500, 5, policy, states) == []
    states.page_out()
    ((now, move),) = play(lambda now: 500, 30, policy, states)
    assert move == "in" and now >= 10


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.002)


def test_the_watcher_moves_states_and_ends_with_their_owner() -> None:
    now_free, states = [500], States()
    moves = states.moves
    thread = pressure.watch(states, lambda: left(now_free[0]), 0.001, PagingPolicy(calm=0.01))
    now_free[0] = 10
    wait_for(lambda: moves == ["out"])
    now_free[0] = 500
    wait_for(lambda: moves == ["out", "in"])
    del states
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_without_room_for_the_watcher_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match="too short for the thread"):
        thread = pressure.watch(States(), lambda: None, 0.001)
    assert not thread.is_alive() and thread not in pressure._watchers


def test_the_watcher_ends_where_nothing_can_be_read() -> None:
    thread = pressure.watch(states := States(), lambda: None, 0.001)
    thread.join(30)
    assert not thread.is_alive() and states.moves == []


AT_THE_END = """
import threading, time
from qlora_native.optim import pressure
from qlora_native._memory import free_memory

class Slow:
    def states_in_memory(self): return 0
    def states_paged_out(self): return 1
    def page_in(self):
        time.sleep(0.3)
        print("moved", flush=True)

states = Slow()
thread = pressure.watch(states, free_memory, 0.001, pressure.PagingPolicy(calm=0.0))
assert thread.daemon
time.sleep(0.1)
"""


def test_a_move_at_the_interpreters_end_is_waited_for() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("moved\n", "", 0)


def test_no_watcher_is_left_behind() -> None:
    gc.collect()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "qlora_native page watcher"])


@pytest.mark.parametrize(
    ("is_integrated", "free", "expected"),
    [(True, 1 << 30, 6 << 30), (True, 7 << 30, 7 << 30), (False, 1 << 30, 1 << 30)],
)
def test_page_cache_counts_as_free_where_device_and_host_share_memory(
    monkeypatch: pytest.MonkeyPatch, is_integrated: bool, free: int, expected: int
) -> None:
    device = torch.device("cuda", 0)
    facts = _cuda_kernels.Facts(110, 20, is_integrated)
    monkeypatch.setattr(_cuda_kernels, "facts", lambda device: facts)
    monkeypatch.setattr(_cuda_kernels, "memory", lambda device: (free, 8 << 30))
    monkeypatch.setattr(_memory, "_read", lambda file: f"MemTotal: {8 << 20} kB\nMemAvailable: {6 << 20} kB\n")
    assert _memory.device_memory(device) == (expected, 8 << 30)
