"""Blocks of memory for large outputs: never more than was in use at one time, used again, given back."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import NoReturn

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qlora_native import _buffers, _memory
from qlora_native._buffers import LEAST, Blocks, empty_like

MIB = 1 << 20


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    blocks = Blocks()
    monkeypatch.setattr(_buffers, "BLOCKS", blocks)
    monkeypatch.setattr(_buffers, "_are_kept", True)
    return blocks


def test_a_block_serves_again_only_when_nothing_uses_it() -> None:
    blocks = Blocks()
    first = blocks.lend(4 * MIB)
    first[0] = 77
    second = blocks.lend(4 * MIB)
    assert second[0] == 0  # other memory
    assert (blocks.used, blocks.kept) == (8 * MIB, 0)
    part = torch.frombuffer(first, dtype=torch.uint8)[MIB:]  # keeps it
    del first
    third = blocks.lend(4 * MIB)
    assert (blocks.used, third[0]) == (12 * MIB, 0)
    del part
    again = blocks.lend(4 * MIB - 5000)
    assert again[0] == 77
    assert (blocks.used, blocks.kept, blocks.most) == (12 * MIB, 0, 12 * MIB)


def test_used_and_kept_are_never_more_than_the_most_in_use() -> None:
    blocks, generator = Blocks(), torch.Generator().manual_seed(0)
    held: list[memoryview] = []
    most = 0
    for size in torch.randint(LEAST, 16 * MIB, (400,), generator=generator).tolist():
        if len(held) == 8 or (held and size % 3 == 0):
            del held[size % len(held)]
        held.append(blocks.lend(size))
        assert blocks.used == sum(view.nbytes for view in held)
        most = max(most, blocks.used)
        assert blocks.used + blocks.kept <= most == blocks.most
        assert all(len(view) >= size for view in held[-1:])
    held.clear()
    blocks.release()
    assert (blocks.used, blocks.kept, blocks.most) == (0, 0, 0)


def test_a_much_larger_block_is_left_for_others() -> None:
    blocks = Blocks()
    del (view := [blocks.lend(8 * MIB)])[0]
    assert not view
    small = blocks.lend(MIB)
    assert len(small) == MIB
    assert (blocks.used, blocks.kept) == (MIB, 0)  # 8 MiB were the most: the free block was given up for this one
    del small


def test_tensors_are_plain_and_large_ones_kept(kept: Blocks) -> None:
    x = torch.randn(512, 600)
    y = empty_like(x, (4, 128, 600))
    assert (y.shape, y.dtype, y.is_contiguous(), y._is_view()) == ((4, 128, 600), x.dtype, True, False)
    assert kept.used == 1200 * 1024
    y.fill_(3.0)
    y.requires_grad_().sum().backward()
    assert y.grad is not None
    empty_like(x, (8,))
    empty_like(x, (8, 0))
    assert kept.used == 1200 * 1024  # small ones are malloc's
    row = y.detach().numpy()[0, 0]
    del y
    gc.collect()
    z = empty_like(torch.nn.Parameter(x))
    assert (row == 3.0).all()
    assert kept.used == 2 * 1200 * 1024
    del z


def test_tracers_have_no_memory(kept: Blocks) -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(512, 600))
        assert empty_like(fake).shape == (512, 600)
    assert empty_like(torch.empty(512, 600, device="meta")).device.type == "meta"
    assert kept.used == 0


ONE_STEP = """
import sys, torch
from qlora_native._memory import keep_freed_memory
from qlora_native.nn import QuantizedLinear
from qlora_native import _buffers

if sys.argv[1] == "kept":
    keep_freed_memory(checkpointing=True)
torch.manual_seed(0)
layer = QuantizedLinear.from_linear(torch.nn.Linear(512, 2048, bias=False).bfloat16())
x = torch.randn(2048, 512, dtype=torch.bfloat16, requires_grad=True)
for step in range(3):
    x.grad = None
    sum(layer(x).float().square().mean() for _ in range(8)).backward()
print(_buffers.BLOCKS.most >> 20, float(x.grad.double().sum()))
"""


def test_a_training_process_takes_the_ops_outputs_from_blocks() -> None:
    found = {}
    for how in ("kept", "malloc's"):
        run = subprocess.run([sys.executable, "-c", ONE_STEP, how], capture_output=True, text=True, check=True)
        found[how] = run.stdout.split()
    assert int(found["malloc's"][0]) == 0  # nothing is kept unless it is asked for
    assert int(found["kept"][0]) >= 8  # MiB, of an output
    assert found["kept"][1] == found["malloc's"][1]


def no_pages(size: int) -> NoReturn:
    raise OSError(12, f"no memory for {size} bytes")


def test_without_pages_tensors_are_torchs_and_what_is_kept_is_given_back(
    kept: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(512, 600)
    del (held := [empty_like(x)])[0]
    assert not held
    monkeypatch.setattr(_buffers, "_mapped", no_pages)
    larger = empty_like(x, (1024, 600))
    assert larger.fill_(2.0).sum() == 2 * larger.numel()
    assert (kept.used, kept.kept) == (0, 0)


def test_short_memory_is_measured_again_without_what_is_kept(kept: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "BLOCKS", kept)
    room = 100 * MIB  # of which blocks take their part, lent or free

    def least() -> _memory.Free:
        taken = kept.used + kept.kept
        return _memory.Free(room - taken, 1024 * MIB, "a limit")  # its margin is 64 MiB

    monkeypatch.setattr(_memory, "_least_free", least)
    block = kept.lend(20 * MIB)
    del block
    found = _memory.free_memory()
    assert found is not None and found.bytes == 80 * MIB  # enough: the block stays
    block = kept.lend(20 * MIB)
    assert kept.most == 20 * MIB
    more = kept.lend(20 * MIB)
    del block, more  # and nobody has asked for a block since
    found = _memory.free_memory()
    assert found is not None and found.bytes == 100 * MIB
