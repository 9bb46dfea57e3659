"""quantize_4bit against the plain-torch truth, byte for byte, and its rules for odd blocks."""

from __future__ import annotations

import pytest
import torch
from cases import BLOCK_SIZES, FLOAT_DTYPES, QUANT_TYPES, WEIGHT_SHAPES
from helpers import refuses, same_bytes
from torch import Tensor

import qlora_native as qn
from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]


def truth(t: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_blocks(t, QUANT_TYPES.index(quant_type), block_size)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_matches_the_reference(shape: tuple[int, ...], quant_type: str, dtype: torch.dtype) -> None:
    t = torch.randn(shape, dtype=torch.float32).to(dtype)
    for block_size in BLOCK_SIZES:
        packed, absmax = truth(t, quant_type, block_size)
        plain = qn.quantize(t, quant_type=quant_type, block_size=block_size, double_quant=False)
        assert same_bytes(plain.packed, packed)
        assert same_bytes(plain.absmax, absmax)
        assert plain.shape == t.shape
        nested = qn.quantize(t, quant_type=quant_type, block_size=block_size)
        for got, want in zip(nested.op_args(), (packed, *reference.quantize_scales(absmax)), strict=False):
            assert same_bytes(got, want)  # type: ignore[arg-type]


@pytest.mark.parametrize(("quant_type", "code"), [("nf4", 7), ("fp4", 0)])
def test_zero_block_and_odd_end(quant_type: str, code: int) -> None:
    t = torch.zeros(129)
    t[128] = -2.0
    w = qn.quantize(t, quant_type=quant_type, double_quant=False)
    assert (w.packed[:64] == code * 17).all()
    assert w.absmax.tolist() == [0.0, 0.0, 2.0]
    assert int(w.packed[-1]) & 15 == code
    assert torch.equal(w.dequantize(), t)


def test_tiny_and_huge_blocks() -> None:
    """Below 2^-128 the reciprocal overflows and the rule divides; above 2^126 it is subnormal and still counts."""
    pattern = torch.linspace(-1, 1, 64)
    for scale in (1e-45, 3e-42, 1e-39, 2.9e-39, 1e-38, 1e37, 3e38):
        t = pattern * scale
        w = qn.quantize(t, double_quant=False)
        assert torch.isfinite(w.dequantize()).all()
        assert same_bytes(w.packed, truth(t, "nf4", 64)[0])
    assert same_bytes(qn.quantize(pattern * 3e-39, double_quant=False).packed[:8], qn.quantize(pattern).packed[:8])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_names_the_element(value: float, dtype: torch.dtype) -> None:
    t = torch.randn(40, 1000).to(dtype)
    t[31, 7] = value
    t[39, 999] = value
    refuses(r"element \[31, 7\] of the \[40, 1000\] tensor is", qn.quantize, t)


def test_refuses_in_words() -> None:
    refuses("block_size is 48: .* 32 to 4096", qn.quantize, torch.zeros(4), block_size=48)
    refuses("quant_type is 'int4': expected 'nf4' or 'fp4'", qn.quantize, torch.zeros(4), quant_type="int4")
