"""Paged states on the CPU: the same bytes wherever they are, within the budget, moved once each way a step."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import paged
import pytest
import torch
from helpers import exit_code_of_fork, sampled
from paged import (
    LEAST,
    MIB,
    OPTIMIZERS,
    Made,
    Params,
    give_grads,
    is_in_file,
    page_dir,
    same_training,
    train,
    train_all,
)
from test_pressure import wait_for

import qlora_native as qn
from qlora_native import _C
from qlora_native._memory import Free
from qlora_native.optim import paging, pressure
from qlora_native.optim.pressure import watch

__all__ = ["page_dir"]

pytestmark = pytest.mark.usefixtures("page_dir")
AdamW = qn.optim.AdamW


made = partial(paged.made, weight_decay=0.1)


def in_file(folder: Path, rule: Any = AdamW, page_budget: int | None = LEAST, **options: Any) -> Made:
    return made(rule, **{"paged": True, "page_dir": folder, "page_budget": page_budget, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("budget", [LEAST, 4 * MIB, 1 << 30, None], ids=["1 MiB", "4 MiB", "all", "by free memory"])
def test_a_page_file_changes_no_byte(dtype: Any, bits: int, budget: int | None, tmp_path: Path) -> None:
    """Of several optimizers, which take turns."""
    options: dict[str, Any] = {"dtype": dtype, "bits": bits, "max_norm": 1.0}
    plain = [made(rule, paged=False, **options) for rule in OPTIMIZERS]
    others = [in_file(tmp_path, rule, budget, **options) for rule in OPTIMIZERS]
    before = torch.get_num_threads()
    for seed in range(5):
        torch.set_num_threads(1 + seed % 2)
        train_all(plain + others, range(seed, seed + 1))
    torch.set_num_threads(before)
    for one, other in zip(plain, others, strict=True):
        assert same_training(one, other)
        assert one[1].grad_norm == other[1].grad_norm
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("rule", [AdamW, qn.optim.Lion])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("budget", [None, 2 * MIB])
def test_states_come_and_go(rule: Any, bits: int, budget: int | None, tmp_path: Path) -> None:
    """auto -> file -> steps there -> evicted -> back in memory, twice."""
    plain = made(rule, bits=bits, paged=False)
    auto = made(rule, bits=bits, page_dir=tmp_path, page_budget=budget)
    optimizer = auto[1]

    def move(seed: int) -> None:
        if seed in (1, 3, 7):
            optimizer.page_out()
        if seed in (5, 8):
            optimizer.page_in()
        statistics = optimizer.paging_statistics()
        total, out = statistics["state_bytes"], statistics["state_bytes"] if seed in (1, 2, 3, 4, 7) else 0
        assert optimizer.states_paged_out() == out and optimizer.states_in_memory() == total - out
        if seed in (1, 3, 7):
            assert statistics["resident_bytes"] == 0 and statistics["paged_out_bytes"] == total > 0

    train(plain[1], plain[0], range(10))
    train(optimizer, auto[0], range(10), after=move)
    assert same_training(plain, auto)


def not_finite(params: Params, optimizer: Any) -> None:
    """Moves nothing."""
    before = optimizer.paging_statistics()
    give_grads(params, 2)
    assert params[2].grad is not None
    params[2].grad[7] = float("nan")
    optimizer.step()
    assert optimizer.skipped and optimizer.paging_statistics() == before


def for_the_ops(params: Params, optimizer: Any) -> None:
    """Gradients that the kernels do not take, only the reference, which reads states as any tensor."""
    for param in params:
        param.grad = torch.ones(2 * param.numel())[::2]
    optimizer.step()
    assert optimizer.paged is not True or optimizer.paging_statistics()["resident_bytes"] <= LEAST


def a_state_of_the_users_own(params: Params, optimizer: Any) -> None:
    """Updated where it is."""
    state = optimizer.state[params[2]]
    state["exp_avg"] = own = state["exp_avg"].clone()
    train(optimizer, params, range(2, 4))
    assert optimizer.state[params[2]]["exp_avg"].data_ptr() == own.data_ptr()


def cleared(params: Params, optimizer: Any) -> None:
    """States begin at 0 again."""
    optimizer.state.clear()


def a_group_more(params: Params, optimizer: Any) -> None:
    """With a parameter that never has a gradient."""
    idle, *others = paged.parameters(sizes=(9000, 4096, 200_000))
    optimizer.add_param_group({"params": [idle, *others], "lr": 1e-3})
    params += others
    train(optimizer, params, range(2, 4))
    assert not optimizer.state[idle]


EVENTS = (not_finite, for_the_ops, a_state_of_the_users_own, cleared, a_group_more)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("paged_as", [True, "auto"])
def test_after_an_event_states_are_those_in_memory(event: Any, bits: int, paged_as: Any, tmp_path: Path) -> None:
    plain = made(paged=False, bits=bits, max_norm=1.0)
    other = in_file(tmp_path, paged=paged_as, bits=bits, max_norm=1.0)
    for params, optimizer in (plain, other):
        train(optimizer, params, range(2))
        event(params, optimizer)
        optimizer.page_out()
        train(optimizer, params, range(4, 6))
    assert same_training(plain, other)
    assert is_in_file(other[1])


@pytest.mark.parametrize("paged_as", [True, "auto"])
def test_thousand_steps_of_torch(paged_as: Any, tmp_path: Path) -> None:
    """The states go out and in all the while."""
    mine, theirs = (paged.parameters(sizes=(3, 5000, 30_000)) for _ in range(2))
    ours = AdamW(mine, lr=1e-3, weight_decay=0.01, paged=paged_as, page_dir=tmp_path, page_budget=LEAST)
    reference = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.01, foreach=False, fused=False)
    for step in range(1000):
        train_all([(mine, ours), (theirs, reference)], range(step, step + 1), skip=False)
        if step % 200 == 100:
            ours.page_out()
        if step % 200 == 199:
            ours.page_in()
    for p, q in zip(mine, theirs, strict=True):
        assert float((p - q).detach().abs().max() / q.detach().abs().max()) < 1e-6


@pytest.mark.parametrize("budget", [LEAST, 3 * MIB, 12 * MIB])
@pytest.mark.parametrize("bits", [32, 8])
def test_resident_bytes_stay_within_the_budget(bits: int, budget: int, tmp_path: Path) -> None:
    params, optimizer = in_file(tmp_path, page_budget=budget, bits=bits)
    with sampled(lambda: optimizer.paging_statistics()["resident_bytes"]) as seen:
        train(optimizer, params, range(6))
    assert len(seen) > 10
    assert max(seen) <= 1.1 * budget


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_moves_each_byte_at_most_once_each_way(bits: int, tmp_path: Path) -> None:
    params, optimizer = in_file(tmp_path, bits=bits)
    after = optimizer.paging_statistics()
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(5):
        optimizer.step()
        before, after = after, optimizer.paging_statistics()
        for way in ("bytes_in", "bytes_out"):
            assert after["state_bytes"] - LEAST <= after[way] - before[way] <= after["state_bytes"]


def test_without_pressure_nothing_moves(tmp_path: Path) -> None:
    params, optimizer = made(page_dir=tmp_path)
    train(optimizer, params, range(3))
    statistics = optimizer.paging_statistics()
    assert {statistics[name] for name in ("bytes_in", "bytes_out", "stalls", "paged_out_bytes")} == {0}
    params, optimizer = in_file(tmp_path, page_budget=1 << 30)
    train(optimizer, params, range(6))
    before = optimizer.paging_statistics()
    train(optimizer, params, range(6, 9))
    assert optimizer.paging_statistics() == before


def test_the_watcher_moves_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The thread that the optimizer starts, with a reading of its own."""
    free = Free(0, 1 << 30, "a test")
    monkeypatch.setattr(pressure, "watch", watch)
    monkeypatch.setattr(paging, "free_memory", lambda: free)
    monkeypatch.setattr(pressure, "INTERVAL", 0.01)
    params, optimizer = made(page_dir=tmp_path)
    train(optimizer, params, range(1))
    wait_for(lambda: optimizer.states_paged_out() > 0)
    train(optimizer, params, range(1, 3))


def held() -> tuple[int, int]:
    """Open files and mappings of files without a name, of this process."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("(deleted)")


@pytest.mark.parametrize("finish", ["page_out", "page_in"])
def test_the_file_goes_with_the_optimizer(finish: str, tmp_path: Path) -> None:
    gc.collect()
    before = held()
    (params, optimizer), others = in_file(tmp_path), made(qn.optim.Lion, page_dir=tmp_path)
    train_all(((params, optimizer), others), range(2))
    optimizer.page_out()
    others[1].page_out()
    getattr(others[1], finish)()
    files, maps = held()
    assert files == before[0] + (2 if finish == "page_out" else 1) and maps > before[1]
    state = optimizer.state[params[2]]["exp_avg"]
    expected = state.clone()
    del params, optimizer, others
    gc.collect()
    assert torch.equal(state, expected)  # a state keeps its arena
    del state
    gc.collect()
    assert held() == before


@pytest.mark.parametrize("paged_out", [False, True])
def test_fork_after_a_step(paged_out: bool, tmp_path: Path) -> None:
    """A child may read the states; what it would write, the parent would see, so it is refused while they are in a
    file."""
    params, optimizer = made(page_dir=tmp_path)
    train(optimizer, params, range(2))
    states = optimizer.state[params[2]]
    expected = {key: value.clone() for key, value in states.items()}
    refusal: Any = nullcontext()
    if paged_out:
        optimizer.page_out()
        refusal = pytest.raises(RuntimeError, match=f"page file of process {os.getpid()}")

    def is_unchanged() -> bool:
        return all(torch.equal(value, expected[key]) for key, value in states.items())

    def step_in_the_child() -> None:
        assert is_unchanged()
        give_grads(params, 3)
        with refusal:
            optimizer.step()

    assert exit_code_of_fork(step_in_the_child) == 0
    assert is_unchanged()
    train(optimizer, params, range(2, 4))


def small(size: int = 100_000) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(size))]


@pytest.mark.parametrize("folder", ["gone", "/dev/shm", "file"])
def test_no_page_file_is_one_sentence(folder: str, tmp_path: Path, sentence: Any) -> None:
    if folder == "/dev/shm" and not _C.lies_in_memory(folder):
        pytest.skip("no tmpfs here")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as raised:
        AdamW(small(), paged=True, page_dir=tmp_path / folder)
    optimizer = AdamW(params := small(), page_dir=tmp_path / folder)
    train(optimizer, params, range(1))
    with pytest.warns(UserWarning, match=re.escape(str(raised.value))) as warned:
        optimizer.page_out()
    sentence(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.page_out()
        train(optimizer, params, range(1, 2))
    assert optimizer.states_in_memory() == optimizer.states_paged_out() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be made: Permission denied"):
        AdamW(small(), paged=True, page_dir=tmp_path)


def test_a_full_disk_and_a_limit_of_file_sizes(tmp_path: Path) -> None:
    meta = torch.nn.Parameter(torch.empty(1 << 40, device="meta"))
    with pytest.raises(OSError, match=r"takes 8796093022208 bytes, and \d+ are free"):
        paging.HostPages("AdamW", AdamW._moments, True, tmp_path, None).reserve([(meta, False)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r" 802816 bytes, .* \d+ .*\(File too large\)"):
            AdamW(small(), paged=True, page_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_group_that_finds_no_room_is_not_added(tmp_path: Path) -> None:
    optimizer = AdamW(small(), paged=True, page_dir=tmp_path)
    tmp_path.rmdir()
    with pytest.raises(OSError, match="cannot be made"):
        optimizer.add_param_group({"params": small()})
    assert len(optimizer.param_groups) == 1


LOST_PAGES = """
import os, sys
import torch
from qlora_native import _C
from qlora_native.optim import AdamW
folder, action = sys.argv[1:]
param = torch.nn.Parameter(torch.zeros(1 << 18))
param.grad = torch.ones_like(param)
optimizer = AdamW([param], paged=True, page_dir=folder)
optimizer.step()
optimizer.page_out()
for number in os.listdir("/proc/self/fd"):
    link = "/proc/self/fd/" + number
    if os.path.islink(link) and folder in os.readlink(link):  # the listing's own descriptor is closed
        os.truncate(link, 0)
if action == "step":
    try:
        optimizer.step()
    except _C.PageFileError as error:
        sys.exit(str(error))
optimizer.state[param]["exp_avg"].sum()
"""


@pytest.mark.parametrize("action", ["step", "read"])
def test_pages_that_the_disk_does_not_give_are_one_sentence(action: str, tmp_path: Path) -> None:
    """A truncated file stands for a bad sector, and for a full disk of a file system that copies on write. What nobody
    fetches, and on Linux before 5.14 all, ends by the signal after the sentence."""
    process = subprocess.run(
        [sys.executable, "-c", LOST_PAGES, str(tmp_path), action], capture_output=True, text=True, check=False
    )
    (line,) = process.stderr.splitlines()
    assert f"page file in {tmp_path} " in line
    assert process.returncode == -signal.SIGBUS or (action == "step" and process.returncode == 1)


def test_page_out_of_nothing() -> None:
    for paged_as in (False, "auto"):
        optimizer = AdamW(params := small(), paged=paged_as)
        optimizer.page_out()
        optimizer.page_in()
        assert set(optimizer.paging_statistics().values()) == {0}
        train(optimizer, params, range(1))
        for call in (optimizer.page_out, optimizer.page_in, optimizer.page_out):
            call()
        train(optimizer, params, range(1, 2))


def test_memory_that_is_not_there_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """auto, when not even the zeros can be had: into the file at once."""
    plain = _C.FileStore

    def store(num_bytes: int, folder: str, in_file: bool) -> Any:
        if not in_file:
            raise MemoryError
        return plain(num_bytes, folder, in_file)

    monkeypatch.setattr(_C, "FileStore", store)
    optimizer = AdamW(params := small(), page_dir=tmp_path)
    train(optimizer, params, range(1))
    assert optimizer.states_paged_out() > 0


def test_a_number_of_two_tensors_is_refused() -> None:
    """Of two, a step over a page file updated the last one alone."""
    plan = _C.PagePlan([(300, 1, False)] * 2, _C.page_bytes, 1 << 20, _C.block_bytes)
    pager = _C.Pager()
    pager.add(_C.FileStore(plan.num_bytes, ".", False), plan)
    data = torch.zeros(2, 3, 300)  # of each tensor: itself, its gradient, its state
    steps = torch.zeros(2)
    rows = torch.tensor([[*(x.data_ptr() for x in each), 0, 0, 0, step.data_ptr(), 300, 0, 0]
                         for each, step in zip(data, steps, strict=True)])  # fmt: skip
    group = (0.1, 0.9, 0.99, 0.0)
    for numbers, is_refused in (([0, 1], False), ([1, -1], False), ([-1, -1], False), ([0, 0], True), ([1, 1], True)):
        given = torch.tensor(numbers)
        with pytest.raises(ValueError, match=f"number 1 is {numbers[1]}") if is_refused else nullcontext():
            _C.lion_step(rows.data_ptr(), 2, [group], 1.0, pager, given.data_ptr(), 1 << 20)
