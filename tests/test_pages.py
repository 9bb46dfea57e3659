"""Huge pages: advice that is taken where it can be, and never changes a value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qlora_native as qn
from qlora_native.ops import _pages


def huge_bytes() -> int:
    """Of this process's memory, by the kernel's count."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def test_values_stay() -> None:
    t = torch.arange(3 << 20, dtype=torch.int32)[5:]  # neither end at a page
    before = t.clone()
    _pages.gather(t)
    _pages.expect(t)
    assert torch.equal(t, before)


def test_small_memory_is_left_alone() -> None:
    assert not _pages.gather(torch.zeros(1 << 18))
    assert not _pages.expect(torch.zeros(0))


@pytest.mark.parametrize("setting", [None, "always madvise [never]"])
def test_not_against_the_systems_setting(setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(_pages, "SETTING", path)
    _pages._madvise.cache_clear()
    try:
        assert not _pages.gather(torch.zeros(4 << 20))
    finally:
        _pages._madvise.cache_clear()


def test_a_large_weight_lies_in_huge_pages() -> None:
    probe = torch.zeros(4 << 20)
    if not _pages.gather(probe):
        pytest.skip("this kernel gives none")
    before = huge_bytes()
    w = qn.quantize(torch.randn(4096, 4096))  # 8 MiB of codes
    qn.linear(torch.randn(1, 4096), w)
    assert huge_bytes() - before >= 6 << 20
