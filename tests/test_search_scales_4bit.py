"""search_scales_4bit: byte for byte the plain-torch truth, which in turn is no worse than looking at every scale."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bytes
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.cases import FLOAT_DTYPES, QUANT_TYPES

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda"), pytest.mark.usefixtures("device")]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, quant_type: int, block_size: int = 64) -> tuple[object, ...]:
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
        packed, chosen = torch.ops.qlora_native.search_scales_4bit(*case)
        expected = reference.search_scales(*case)  # type: ignore[arg-type]
        assert same_bytes(chosen, expected[1])
        assert same_bytes(packed, expected[0])


def test_no_scale_of_the_table_is_better() -> None:
    """In double precision, with the nearest of all levels: an independent look at every candidate."""
    t, moment, table, multiplier, offset, *_ = case = arguments((4, 128), torch.float32, 0)
    _, chosen = torch.ops.qlora_native.search_scales_4bit(*case[:7], 0.0, 1e30, *case[9:])
    assert isinstance(t, Tensor)
    assert isinstance(moment, Tensor)
    assert isinstance(table, Tensor)
    assert isinstance(multiplier, Tensor)
    assert isinstance(offset, Tensor)
    blocks = t.double().reshape(-1, 1, 64, 1)
    scales = (table * multiplier[0] + offset).double()
    levels = qn._native.levels(0).to(t.device).double()
    errors = (blocks - scales.reshape(-1, 1, 1) * levels).square().amin(3)
    weighted = (errors * moment.double().reshape(2, 1, 64).repeat(4, 1, 1)).sum(2)
    best = weighted.amin(1)
    assert torch.allclose(weighted.gather(1, chosen.long()[:, None])[:, 0], best, rtol=1e-5, atol=1e-12)


def test_threads_do_not_matter() -> None:
    case = arguments((97, 576), torch.bfloat16, 0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.ops.qlora_native.search_scales_4bit(*case))
    torch.set_num_threads(before)
    assert all(same_bytes(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_non_contiguous_and_empty() -> None:
    t, *rest = arguments((64, 96), torch.float32, 0)
    assert isinstance(t, Tensor)
    strided = t.t().contiguous().t()
    straight = torch.ops.qlora_native.search_scales_4bit(t, *rest)
    assert all(
        same_bytes(a, b)
        for a, b in zip(torch.ops.qlora_native.search_scales_4bit(strided, *rest), straight, strict=True)
    )
    case = arguments((0, 96), torch.float32, 0)
    packed, chosen = torch.ops.qlora_native.search_scales_4bit(*case)
    assert packed.numel() == chosen.numel() == 0


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.qlora_native.search_scales_4bit.default, arguments((8, 96), torch.float32, 0))


def test_errors() -> None:
    t, moment, *rest = arguments((8, 96), torch.float32, 0)
    assert isinstance(moment, Tensor)
    with pytest.raises(ValueError, match=r"moment is torch.float32 \[95\].*expected 96"):
        torch.ops.qlora_native.search_scales_4bit(t, moment[:95], *rest)
    rest[4] = 0
    with pytest.raises(ValueError, match="group is 0"):
        torch.ops.qlora_native.search_scales_4bit(t, moment, *rest)
