"""requantize_4bit: byte for byte the plain-torch truth, and the nearest codes in double precision."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from helpers import bytes_of, gguf_truth, gguf_weight, refuses, same_bytes, same_bytes_under_threads, signed
from torch import Tensor

import qlora_native as qn
from qlora_native import gguf_blocks, reference
from qlora_native.cases import QUANT_TYPES
from qlora_native.hf.gguf import KEPT

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda"), pytest.mark.usefixtures("device")]
requantize = torch.ops.qlora_native.requantize_4bit


def adapted(
    shape: tuple[int, int], r: int = 5, size: float = 0.1, **options: Any
) -> tuple[Tensor, Tensor, qn.QuantizedWeight]:
    """A, B and a weight; B A is of the order of ``size``, the weight of 1, or of 0.1 in a GGUF type."""
    (n, k), kind = shape, options.get("quant_type", "nf4")
    w = gguf_weight(kind, shape) if kind in KEPT else qn.quantize(torch.randn(n, k), **options)
    return torch.randn(r, k), torch.randn(n, r) * size / max(r, 1) ** 0.5, w


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", [(5, 77), (1, 1), (3, 96), (33, 576), (7, 1120), (20, 32), (4, 0), (0, 64)], ids=str)
def test_matches_the_reference(shape: tuple[int, int], quant_type: str) -> None:
    for r, size, options in (
        (1, 0.02, {}),
        (16, 0.3, {"block_size": 32}),
        (5, 3.0, {"double_quant": False}),
        (0, 0, {}),
    ):
        a, b, w = adapted(shape, r, size, quant_type=quant_type, **options)
        arguments = (a, b, 1.7, *w.op_args())
        assert same_bytes(requantize(*arguments), reference.requantize(*arguments))


@pytest.mark.parametrize("quant_type", sorted(KEPT))
@pytest.mark.parametrize("shape", [(5, 256), (1, 1280), (33, 768)], ids=str)
def test_blocks_match_the_reference(shape: tuple[int, int], quant_type: str) -> None:
    for r, size in ((1, 0.002), (16, 0.03), (5, 3.0), (0, 0)):
        a, b, w = adapted(shape, r, size, quant_type=quant_type)
        for weight in (w, gguf_weight(quant_type, shape, any_scale=True)):
            arguments = (a, b, 1.7, *weight.op_args())
            assert same_bytes(requantize(*arguments), reference.requantize(*arguments))


@pytest.mark.parametrize("quant_type", sorted(KEPT))
def test_the_nearest_of_all_levels_of_a_block(quant_type: str) -> None:
    """In double precision, of the values that a block decodes to with each code throughout; the scales stay."""
    a, b, w = adapted((20, 512), size=0.03, quant_type=quant_type)
    number, blocks = w.op_args().quant_type, w.packed.view(-1, bytes_of(w))

    def values(packed: Tensor) -> Tensor:
        return gguf_truth(w._with(w.op_args()._replace(packed=packed.reshape(-1)))).double()

    target = values(blocks) + 2 * b.double() @ a.double()
    found = requantize(a, b, 2.0, *w.op_args()).view(blocks.shape)
    best = torch.full_like(target, torch.inf)
    for code in range(len(gguf_blocks.levels(number))):
        codes = torch.full((len(blocks), w.block_size), code, dtype=torch.uint8)
        best = best.minimum((values(gguf_blocks.with_codes(blocks, codes, number)) - target).abs())
    assert torch.allclose((values(found) - target).abs(), best, rtol=0, atol=1e-6)
    assert same_bytes(gguf_blocks.with_codes(found, gguf_blocks.codes(blocks, number), number), blocks)
    assert 0.05 < float((found != blocks).double().mean()) < 1


def test_the_nearest_of_all_levels() -> None:
    """In double precision, whatever the sign of the scale."""
    a, b, w = adapted((40, 192))
    for weight in (w, signed(w)):
        packed = requantize(a, b, 2.0, *weight.op_args())
        found = weight._with(weight.op_args()._replace(packed=packed)).dequantize(torch.float32).double()
        target = weight.dequantize(torch.float32).double() + 2 * b.double() @ a.double()
        levels = qn._native.levels(0).to(target.device).double()
        choices = levels * weight.scales().double().repeat_interleave(64).view(*target.shape, 1)
        best = (choices - target[..., None]).abs().amin(-1)
        assert torch.allclose((found - target).abs(), best, rtol=0, atol=1e-6)
        assert 0.05 < float((packed != weight.packed).double().mean()) < 1


def test_no_change_keeps_the_codes_and_no_number_is_the_lowest() -> None:
    a, b, w = adapted((6, 128))
    w.packed[:32] = 0x77  # a block of zeros, whose scale has no reciprocal
    w.absmax, w.nested_absmax, w.nested_offset = w.scales(), None, None
    w.absmax[0] = 0
    assert same_bytes(requantize(a, 0 * b, 1.0, *w.op_args()), w.packed)
    assert same_bytes(requantize(a, b * 1e30, 1e30, *w.op_args())[:32], w.packed[:32])
    b[1] = torch.nan
    packed = requantize(a, b, 1.0, *w.op_args())
    assert not packed[64:128].any()
    assert packed[128:].any()


@pytest.mark.parametrize(
    ("shape", "quant_type"), [((97, 96), "nf4"), ((61, 77), "nf4"), ((300, 32), "nf4"), ((97, 256), "q5_k")], ids=str
)
def test_where_there_is_no_kernel(shape: tuple[int, int], quant_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of rows, of which not all begin with a block of scales."""
    module = importlib.import_module("qlora_native.ops.requantize_4bit")
    monkeypatch.setattr(module, "ELEMENTS", 2048)
    a, b, w = adapted(shape, quant_type=quant_type)
    monkeypatch.setattr(module, "say_once", lambda sentence: None)
    assert same_bytes(module.anywhere(a, b, 1.0, *w.op_args()), requantize(a, b, 1.0, *w.op_args()))


def test_threads_do_not_matter() -> None:
    for shape, quant_type in (((97, 576), "nf4"), ((61, 77), "nf4"), ((97, 512), "q6_k")):
        a, b, w = adapted(shape, quant_type=quant_type)
        same_bytes_under_threads(partial(requantize, a, b, 1.0, *w.op_args()))


def test_non_contiguous_operands() -> None:
    a, b, w = adapted((33, 96))
    strided = requantize(a.t().contiguous().t(), b.t().contiguous().t(), 1.0, *w.op_args())
    assert same_bytes(strided, requantize(a, b, 1.0, *w.op_args()))


def test_opcheck() -> None:
    a, b, w = adapted((8, 96))
    torch.library.opcheck(requantize.default, (a, b, 1.0, *w.op_args()))


def test_errors() -> None:
    a, b, w = adapted((8, 96))
    refuses(r"b is torch.float32 \[7, 5\].*expected torch.float32 \[8, 5\]", requantize, a, b[:7], 1.0, *w.op_args())
    refuses(r"\[8, 96\].*whole blocks of q4_k, 256", requantize, a, b, 1.0, *gguf_weight("q4_k", (8, 96)).op_args())
