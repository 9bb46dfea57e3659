"""dequantize_4bit against the plain-torch truth, byte for byte."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import BLOCK_SIZES, FLOAT_DTYPES, GGUF_TYPES, QUANT_TYPES, WEIGHT_SHAPES
from helpers import HALVES, bytes_of, gguf_truth, gguf_weight, refuses, same_bytes, same_values, signed
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.ops.dequantize_4bit import decode_panel

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]


def truth(w: qn.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(dtype, *w.op_args())


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_matches_the_reference(shape: tuple[int, ...], quant_type: str) -> None:
    t = torch.randn(shape)
    for block_size in BLOCK_SIZES:
        for double_quant in (False, True):
            w = qn.quantize(t, quant_type=quant_type, block_size=block_size, double_quant=double_quant)
            for dtype in FLOAT_DTYPES:
                assert same_bytes(w.dequantize(dtype), truth(w, dtype))
                assert same_bytes(signed(w).dequantize(dtype), truth(signed(w), dtype))


@pytest.mark.parametrize("scale", [1e-42, 1e-39, 3e-8, 7e4, 2e38])
def test_rounding_at_the_edges_of_the_formats(scale: float) -> None:
    """Subnormal results in every format, and overflow of float16 to infinity."""
    w = qn.quantize((torch.rand(64, 16) * 2 - 1) * scale, double_quant=False)
    for dtype in FLOAT_DTYPES:
        assert same_bytes(w.dequantize(dtype), truth(w, dtype))


def test_infinite_and_nan_scales_of_foreign_checkpoints() -> None:
    w = qn.quantize(torch.randn(192), double_quant=False)
    w.absmax[0], w.absmax[1] = float("inf"), float("nan")
    for dtype in FLOAT_DTYPES:
        assert same_values(w.dequantize(dtype), truth(w, dtype))


def test_negative_scales_decode() -> None:
    """As a code under a positive scale, with the sign flipped; nested ones to the rounding of an 8-bit scale."""
    t = torch.randn(300, 64)
    plain = qn.quantize(t, double_quant=False)
    negative = (torch.arange(300) % 2 == 0)[:, None]
    want = torch.where(negative, -plain.dequantize(), plain.dequantize())
    assert torch.equal(signed(plain).dequantize(), want)
    nested = signed(qn.quantize(t))
    assert nested.nested_offset is not None and abs(float(nested.nested_offset)) < 0.2
    assert bool((nested.scales() < 0).any())
    assert float((nested.dequantize() - want).abs().max()) < 0.1


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_panels(quant_type: str) -> None:
    """Those of NF4 and FP4 are tests/cpp/test_dequantize_4bit.cc's."""
    w = gguf_weight(quant_type, (5, 512))
    truth = gguf_truth(w)
    columns = ((0, 512), (32, 96), (7, 500), (255, 257), (33, 40), (9, 9))
    for dtype, (start, stop), (first, last) in itertools.product(FLOAT_DTYPES, ((0, 5), (2, 4), (1, 1)), columns):
        panel = torch.empty(stop - start, last - first, dtype=dtype)
        decode_panel(w.op_args().pointers(), 512, (start, stop), (first, last), panel)
        assert same_bytes(panel, truth[start:stop, first:last].to(dtype))


@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_blocks_of_any_bytes(quant_type: str) -> None:
    """The bits of the ``gguf`` package, but for the payload of NaN: of random bytes, and of every byte everywhere."""
    w = gguf_weight(quant_type, (600, 256), any_scale=True)
    blocks = w.packed.view(-1, bytes_of(w))
    blocks[:256] = torch.arange(256, dtype=torch.uint8)[:, None] + 37 * torch.arange(bytes_of(w), dtype=torch.uint8)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 6e-8, -0.0, 65504.0]).half().view(torch.uint8).view(-1, 2)
    for at in HALVES[quant_type]:
        blocks[256 + at : 262 + at, at : at + 2] = special
    truth = gguf_truth(w)
    assert truth.isinf().any() and truth.isnan().any() == (quant_type != "mxfp4")
    for dtype in FLOAT_DTYPES:
        want = truth.to(dtype).masked_fill(truth.isnan(), 0.0)
        for got in (w.dequantize(dtype), reference.dequantize(dtype, *w.op_args())):
            assert torch.equal(got.isnan(), truth.isnan()) and same_bytes(got.masked_fill(got.isnan(), 0.0), want)


@pytest.mark.devices("cpu", "emulated")
@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_rows_of_an_embedding(quant_type: str) -> None:
    w = gguf_weight(quant_type, (50, 512))
    ids = torch.randint(50, (3, 7))
    assert same_bytes(qn.dequantize_rows(w, ids), gguf_truth(w).bfloat16()[ids])
    assert qn.dequantize_rows(w, ids[:0], torch.float32).shape == (0, 7, 512)
    with pytest.raises(IndexError):
        qn.dequantize_rows(w, torch.tensor([50]))
    refuses(r"\[25600\] in", qn.dequantize_rows, w.flatten(), ids)
    refuses("nf4", qn.dequantize_rows, qn.quantize(torch.randn(4, 64)), ids)


def test_out() -> None:
    w = qn.quantize(torch.randn(6, 96))
    for out in (torch.empty(6, 96), torch.empty(6, 96).half(), torch.empty(96, 6).t(), torch.empty(7, 97)[1:, 1:]):
        assert w.dequantize(out=out) is out
        assert same_bytes(out.contiguous(), truth(w, out.dtype))
    refuses("torch.float16, out is torch.float32", w.dequantize, torch.float16, out=torch.empty(6, 96))
    refuses(r"dtype is torch\.int8", w.dequantize, torch.int8)


@pytest.mark.devices("cpu")
def test_native_boundary_checks_again() -> None:
    """The extension refuses what ops.py would never pass: it takes raw addresses."""
    native: Any = qn._native._C
    w = qn.quantize(torch.randn(2, 64), double_quant=False)
    decode, pointers, out = native.dequantize_4bit, w.op_args().pointers(), torch.empty(128)
    refuses("weight of 128 elements", decode, 0, out.data_ptr(), 64, 0, 3, 0, 64, pointers)
    refuses("out is not aligned to 4 bytes", decode, 0, out.data_ptr() + 1, 64, 0, 2, 0, 64, pointers)
    refuses("out is a null pointer", decode, 0, 0, 64, 0, 2, 0, 64, pointers)
    refuses("dtype is 9", decode, 9, out.data_ptr(), 64, 0, 2, 0, 64, pointers)


@pytest.mark.devices("cpu")
def test_indices_beyond_32_bits() -> None:
    """A weight of 2^31 + 64 elements whose packed bytes are one mapped, mostly untouched gigabyte."""
    n = 2**31 + 64
    packed = torch.zeros(n // 2, dtype=torch.uint8)
    packed[-32:] = 0xF0
    absmax = torch.ones(n // 4096 + 1)
    rows = n // 64
    weight = qn.QuantizedWeight(packed, absmax, shape=(rows, 64), dtype=torch.bfloat16, block_size=4096)
    panel = torch.empty(2, 64)
    decode_panel(weight.op_args().pointers(), 64, (rows - 2, rows), (0, 64), panel)
    assert torch.equal(panel[0], torch.full((64,), -1.0))
    assert torch.equal(panel[1], torch.tensor([1.0, -1.0]).repeat(32))
