"""Huge pages: advice that is taken where it can be, and never changes a value."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

import qlora_native as qn
from qlora_native import _buffers


def huge_bytes(address: int) -> int:
    """In huge pages, of the mapping that holds an address, by the kernel's count."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    for first, last, kib in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (?s:.*?)^AnonHugePages: +(\d+)", smaps, re.MULTILINE):
        if int(first, 16) <= address < int(last, 16):
            return int(kib) << 10
    raise AssertionError(f"no mapping holds {address:#x}")


def test_values_stay_and_small_memory_is_left_alone() -> None:
    t = torch.arange(3 << 20, dtype=torch.int32)[5:]  # neither end at a page
    before = t.clone()
    _buffers.gather_pages(t)
    _buffers.expect_pages(t)
    assert torch.equal(t, before)
    assert not _buffers.gather_pages(torch.zeros(1 << 18)) and not _buffers.expect_pages(torch.zeros(0))


@pytest.mark.parametrize("setting", [None, "always madvise [never]"])
def test_not_against_the_systems_setting(setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(_buffers, "SETTING", path)
    monkeypatch.setattr(_buffers, "_madvise", _buffers._madvise.__wrapped__)  # without its cache
    assert not _buffers.gather_pages(torch.zeros(4 << 20))


def test_gathered_memory_lies_in_huge_pages() -> None:
    size = 16 << 20
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    t = torch.frombuffer(memory, dtype=torch.uint8)
    t.fill_(7)
    assert huge_bytes(t.data_ptr()) == 0
    memory.madvise(mmap.MADV_HUGEPAGE)  # takes the refusal back; only what is touched later would follow
    assert huge_bytes(t.data_ptr()) == 0
    if not _buffers.gather_pages(t):
        pytest.skip("this kernel gives none")
    assert huge_bytes(t.data_ptr()) >= size - 2 * _buffers.HUGE_PAGE
    assert bool((t == 7).all())


def test_a_quantized_weight_is_expected_and_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(_buffers, "_advise", lambda tensor, advice: advised.append((tensor.data_ptr(), advice)))
    w = qn.quantize(torch.randn(64, 64))
    assert advised == [(w.packed.data_ptr(), _buffers.MADV_HUGEPAGE)]
    for _ in range(2):  # at the first product only
        qn.linear(torch.randn(1, 64), w)
    assert advised[1:] == [(w.packed.data_ptr(), _buffers.MADV_COLLAPSE)]


def test_pages_are_interleaved_over_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not _buffers.nodes():
        pytest.skip("the system does not list its NUMA nodes")
    t = torch.arange(1 << 20, dtype=torch.int32)
    before = t.clone()
    if not _buffers.interleave(t, _buffers.nodes()[:1]):
        pytest.skip("the system does not let a process choose nodes")
    assert torch.equal(t, before)
    policies = [line.split()[:2] for line in Path("/proc/self/numa_maps").read_text(encoding="ascii").splitlines()]
    inside = [policy for start, policy in policies if t.data_ptr() <= int(start, 16) < t.data_ptr() + t.nbytes]
    assert inside and inside[0].startswith("interleave")


@pytest.mark.parametrize(
    ("listed", "found"), [("0", (0,)), ("0-1", (0, 1)), ("0,2-3", (0, 2, 3)), ("", ())], ids=["1", "2", "gap", "none"]
)
def test_nodes(listed: str, found: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "online").write_text(listed + "\n")
    monkeypatch.setattr(_buffers, "NODES", tmp_path / "online")
    assert _buffers.nodes.__wrapped__() == found
