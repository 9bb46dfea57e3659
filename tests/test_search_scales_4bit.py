"""search_scales_4bit: byte for byte the plain-torch truth, which in turn is no worse than looking at every scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES, QUANT_TYPES
from helpers import refuses, same_bytes

import qlora_native as qn
from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda"), pytest.mark.usefixtures("device")]
search = torch.ops.qlora_native.search_scales_4bit


def arguments(shape: tuple[int, ...], dtype: torch.dtype, quant_type: int, block_size: int = 64) -> tuple[Any, ...]:
    """Of the op: a nested table around an offset, a block of zeros, moments that reach over decades."""
    t = torch.randn(shape).to(dtype)
    t.view(-1)[block_size : 2 * block_size] = 0
    blocks = -(-t.numel() // block_size)
    moment = torch.randn(shape[-1]).mul(2).exp()
    table = qn._native.nested_code().to(t.device)
    multiplier = torch.full((-(-blocks // 256),), 3.7)
    initial = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    return t, moment, table, multiplier, torch.tensor(-0.02), initial, 256, 0.375, 1.125, quant_type, block_size


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_matches_the_reference(quant_type: str, dtype: torch.dtype) -> None:
    for shape in ((5, 77), (3, 96), (64, 192), (1, 4100)):
        case = arguments(shape, dtype, QUANT_TYPES.index(quant_type))
        assert all(map(same_bytes, search(*case), reference.search_scales(*case)))


def test_no_scale_of_the_table_is_better() -> None:
    """In double precision, with the nearest of all levels: an independent look at every candidate."""
    t, moment, table, multiplier, offset, *_ = case = arguments((4, 128), torch.float32, 0)
    _, chosen = search(*case[:7], 0.0, 1e30, *case[9:])
    blocks = t.double().reshape(-1, 1, 64, 1)
    scales = (table * multiplier[0] + offset).double()
    levels = qn._native.levels(0).to(t.device).double()
    errors = (blocks - scales.reshape(-1, 1, 1) * levels).square().amin(3)
    weighted = (errors * moment.double().reshape(2, 1, 64).repeat(4, 1, 1)).sum(2)
    best = weighted.amin(1)
    assert torch.allclose(weighted.gather(1, chosen.long()[:, None])[:, 0], best, rtol=1e-5, atol=1e-12)


def test_empty_and_no_group() -> None:
    assert [t.numel() for t in search(*arguments((0, 96), torch.float32, 0))] == [0, 0]
    case = arguments((8, 96), torch.float32, 0)
    refuses("group is 0", search, *case[:6], 0, *case[7:])
