"""QuantizedWeight: copies, moves, slices, and bitsandbytes' form both ways."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import GGUF_TYPES
from helpers import bytes_of, gguf_weight, refuses, same_bytes, same_weight, signed, through_a_file

import qlora_native as qn


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), through_a_file, lambda w: w.to("cpu")],
    ids=["copy", "deepcopy", "pickle", "torch.save", "to"],
)
def test_duplicates(duplicate: Callable[[qn.QuantizedWeight], qn.QuantizedWeight]) -> None:
    for double_quant in (False, True):
        w = qn.quantize(torch.randn(37, 65), quant_type="fp4", block_size=32, double_quant=double_quant)
        assert same_weight(duplicate(w), w)


@pytest.mark.parametrize("double_quant", [False, True])
def test_other_codes_under_the_same_scales(double_quant: bool) -> None:
    w, other = (qn.quantize(torch.randn(37, 65), double_quant=double_quant) for _ in range(2))
    mixed = w.with_packed(other.packed)
    assert mixed.packed is other.packed and same_weight(mixed.with_packed(w.packed), w)
    levels = other.dequantize() / other.scales().repeat_interleave(64)[: other.numel()].view(other.shape)
    expected = levels * w.scales().repeat_interleave(64)[: w.numel()].view(w.shape)
    assert torch.allclose(mixed.dequantize(), expected, rtol=1e-5)
    assert not torch.equal(w.packed, other.packed)  # the weight itself is unchanged


def test_attributes() -> None:
    w = qn.quantize(torch.randn(300, 64, dtype=torch.bfloat16))
    packed, absmax, nested_absmax, nested_offset, code, nested_code, *_ = w.op_args()
    assert nested_absmax is not None and nested_offset is not None and code is nested_code is None
    assert (packed.shape, absmax.shape, nested_absmax.shape, nested_offset.shape) == ((9600,), (300,), (2,), ())
    assert absmax.dtype == torch.uint8
    assert (w.shape, w.dtype, w.block_size, w.double_quant) == ((300, 64), torch.bfloat16, 64, True)
    assert w.numel() == 19200
    assert w.nbytes == 9600 + 300 + 8 + 4
    plain = qn.quantize(torch.randn(300, 64), double_quant=False)
    assert plain.nested_absmax is plain.nested_offset is None and not plain.double_quant
    for made in (w, plain):
        empty = qn.QuantizedWeight.empty(w.shape, dtype=w.dtype, double_quant=made.double_quant, device="meta")
        pairs = zip(empty.op_args()[:4], made.op_args()[:4], strict=True)
        assert all(a is b is None or (a is not None and b is not None and a.shape == b.shape) for a, b in pairs)


@pytest.mark.parametrize("rows", [256, 32])
@pytest.mark.parametrize("double_quant", [False, True])
def test_slices_of_stacked_experts(rows: int, double_quant: bool) -> None:
    w = qn.quantize(torch.randn(5, rows, 64), double_quant=double_quant)
    whole = w.dequantize()
    for index in (0, 3, -1):
        assert same_bytes(w[index].dequantize(), whole[index])
    assert w[1].packed.untyped_storage().data_ptr() == w.packed.untyped_storage().data_ptr()
    with pytest.raises(IndexError):
        w[5]


@pytest.mark.parametrize("width", [33, 96])
@pytest.mark.parametrize("double_quant", [False, True])
def test_slices_of_rows(double_quant: bool, width: int) -> None:
    """A slice that begins at a block has the values of those rows; scales stay nested where a block of them begins."""
    w = signed(qn.quantize(torch.randn(1030, width), block_size=32, double_quant=double_quant))
    whole = w.dequantize()
    for start, stop in ((0, 1030), (0, 1), (32, 33), (256, 1000), (992, 1030), (512, 512)):
        part = w.slice(start, stop)
        assert part.shape == (stop - start, width)
        assert same_bytes(part.dequantize(), whole[start:stop])
        assert same_bytes(part.scales(), w.scales()[start * width // 32 : -(-stop * width // 32)])
        assert part.double_quant == (double_quant and start * width % 8192 == 0)
        assert part.packed.untyped_storage().data_ptr() == w.packed.untyped_storage().data_ptr()
    assert same_bytes(w.flatten().slice(32, 70).dequantize(), whole.flatten()[32:70])
    for start, stop in ((-1, 3), (3, 2), (0, 1031)):
        with pytest.raises(IndexError, match="1030"):
            w.slice(start, stop)


def test_slice_that_begins_inside_a_block() -> None:
    w = qn.quantize(torch.randn(4, 96))
    refuses("96.* block_size 64", lambda: w[1])
    refuses("96.* block_size 64", w.slice, 1, 3)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bnb_round_trip(storage: torch.dtype, double_quant: bool) -> None:
    w = qn.quantize(torch.randn(32, 64, dtype=torch.float16), double_quant=double_quant)
    w.storage_dtype = storage
    w = signed(w) if storage == torch.uint8 else w
    tensors = qn.to_bnb(w, "layer.weight")
    assert all(key == "layer.weight" or key.startswith("layer.weight.") for key in tensors)
    assert tensors["layer.weight"].dtype == storage
    assert tensors["layer.weight"].shape == (1024 // storage.itemsize, 1)
    back = qn.from_bnb(tensors, "layer.weight")
    assert same_weight(back, w)
    again = qn.to_bnb(back, "layer.weight")
    assert list(again) == list(tensors)
    assert all(same_bytes(again[key], tensors[key]) for key in tensors)


def test_foreign_maps_are_honored_and_saved_again() -> None:
    w = qn.quantize(torch.randn(32, 64))
    tensors = qn.to_bnb(w)
    tensors["weight.quant_map"] = torch.nextafter(tensors["weight.quant_map"], torch.tensor(2.0))
    tensors["weight.nested_quant_map"] = tensors["weight.nested_quant_map"] * 1.5
    back = qn.from_bnb(tensors)
    assert back.code is not None and back.nested_code is not None
    assert not torch.equal(back.scales(), w.scales())
    table = tensors["weight.quant_map"]
    codes = torch.stack([back.packed >> 4, back.packed & 15], 1).reshape(-1).long()
    want = table[codes] * back.scales().repeat_interleave(64)
    assert same_bytes(back.dequantize(), want.reshape(32, 64))
    assert all(same_bytes(value, tensors[key]) for key, value in qn.to_bnb(back).items())


def test_loads_in_bitsandbytes() -> None:
    """Their reader rebuilds the same matrix from our tensors."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for quant_type, double_quant in itertools.product(("nf4", "fp4"), (False, True)):
        w = qn.quantize(torch.randn(32, 64), quant_type=quant_type, double_quant=double_quant)
        tensors = qn.to_bnb(w)
        packed = tensors.pop("weight")
        state = functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
        assert torch.equal(functional.dequantize_4bit(packed, state), w.dequantize())


def test_broken_tensors_are_named() -> None:
    tensors = qn.to_bnb(qn.quantize(torch.randn(32, 64)))
    refuses("there is no 'w.quant_state", qn.from_bnb, tensors, "w")
    without = {key: value for key, value in tensors.items() if key != "weight.nested_absmax"}
    refuses("key 'weight.nested_absmax' is missing", qn.from_bnb, without)
    for name, value, expected in (
        ("weight.absmax", tensors["weight.absmax"][:-1], r"is torch\.uint8 with 31 elements: expected 32"),
        ("weight", tensors["weight"][:1000], r"is torch\.uint8 with 1000 elements: expected 1024"),
        ("weight.quant_state.bitsandbytes__nf4", torch.tensor([1, 2], dtype=torch.uint8), "quant state"),
    ):
        refuses(f"'{name}' .*{expected}", qn.from_bnb, {**tensors, name: value})
    odd = qn.quantize(torch.randn(6))
    odd.storage_dtype = torch.float32
    refuses(r"3 packed bytes .* torch\.float32", qn.to_bnb, odd)


@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_weight_as_a_value(quant_type: str) -> None:
    """Copies, slices at whole blocks, and a layer's state_dict keep the bytes; what needs apart scales is refused."""
    w = gguf_weight(quant_type, (6, 256))
    whole = w.dequantize()
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), through_a_file(w), w.to("cpu"), w.slice(0, 6)):
        assert same_weight(twin, w)
    assert w.nbytes == w.packed.numel() == 6 * 256 // w.block_size * bytes_of(w) and not w.double_quant
    assert same_bytes(w.slice(2, 5).dequantize(), whole[2:5])
    assert same_bytes(w[-1].dequantize(), whole[-1])
    assert same_bytes(w.flatten().slice(256, 1024).dequantize(), whole.flatten()[256:1024])
    for start, stop in ((0, 8), (8, 264)):
        refuses(f"at element 8, no multiple of block_size {w.block_size}", w.flatten().slice, start, stop)
    layer = qn.nn.QuantizedLinear.from_quantized(w)
    stored = through_a_file(layer.state_dict())
    other = qn.nn.QuantizedLinear(256, 6, bias=False, device="meta")
    other.load_state_dict(stored, assign=True)
    assert same_weight(other.quantized, w)
    stored["weight"] = stored["weight"][:-1]
    with pytest.raises(RuntimeError, match=f"{w.packed.numel()} contiguous"):
        other.load_state_dict(stored, assign=True)
    refuses("inside its blocks", w.scales)
    refuses("inside its blocks", qn.to_bnb, w)
    refuses("expected 'nf4' or 'fp4'", qn.quantize, whole, quant_type=quant_type)
    refuses("cannot be sharded", layer.lay_out_for_sharding)
    w.absmax = torch.ones(1)
    refuses("absmax is .* expected 0", w.dequantize)


def test_gguf_blocks_that_do_not_fill_a_weight() -> None:
    about = {"dtype": torch.float32, "quant_type": "q4_k"}
    of_blocks, block = qn.QuantizedWeight.of_blocks, torch.zeros(144).byte()
    refuses("whole blocks of 256", of_blocks, block, shape=(3, 128), **about)
    refuses("expected 288", of_blocks, block, shape=(4, 128), **about)
    refuses("expected one of GGUF's", of_blocks, block, shape=(288,), **{**about, "quant_type": "nf4"})
