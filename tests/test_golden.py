"""Our bytes against bitsandbytes' own, case by case."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOLERANCE
from helpers import relative_error, same_bytes, same_values
from safetensors import safe_open
from torch import Tensor

import qlora_native as qn
from qlora_native import _native
from qlora_native.weight import QuantizedWeight

pytestmark = pytest.mark.isa

FILE = Path(__file__).parent / "golden" / "bnb_golden.safetensors"
with safe_open(FILE, "pt") as _file:
    KEYS = sorted(_file.keys())

PATTERN = re.compile(r"(q/([^/]+)/(nf4|fp4)/bs(\d+)/dq([01])(?:/(?:bfloat16|float16|float32))?)/packed$")
CASES = [match.groups() for match in map(PATTERN.match, KEYS) if match]
# Zero, tiny and non-finite blocks differ between bitsandbytes' back ends: our rule for them has tests of its own.
OWN_RULE = ("nonfinite_f32", "tiny_f32", "zeroblock_f32", "allzero_f32", "allzero_partial_bf16")
NAMES = ("base", "case", "quant_type", "block", "nested")


def stored_weight(golden: dict[str, Tensor], base: str, case: str, quant_type: str, block: str) -> QuantizedWeight:
    x, packed = golden[f"in/{case}"], golden[f"{base}/packed"]
    return QuantizedWeight(
        packed.contiguous().view(torch.uint8).reshape(-1),
        golden[f"{base}/absmax"],
        shape=x.shape,
        dtype=x.dtype,
        quant_type=quant_type,
        block_size=int(block),
        nested_absmax=golden.get(f"{base}/nested_absmax"),
        nested_offset=golden.get(f"{base}/nested_offset"),
    )


def test_tables(golden: dict[str, Tensor]) -> None:
    assert len(CASES) > 100
    assert same_bytes(_native.levels(0), golden["codebook/nf4"])
    assert same_values(_native.levels(1), golden["codebook/fp4"])
    assert not torch.signbit(_native.levels(1)[8])
    assert same_bytes(_native.nested_code(), golden["map/dynamic_signed"])
    assert same_bytes(_native.boundaries(0), golden["bounds/nf4"])
    assert same_bytes(_native.boundaries(1), golden["bounds/fp4_cuda_abs"])


@pytest.mark.parametrize(NAMES, CASES)
def test_dequantized(golden: dict[str, Tensor], base: str, case: str, quant_type: str, block: str, nested: str) -> None:
    weight = stored_weight(golden, base, case, quant_type, block)
    if f"{base}/absmax_fp32" in golden:
        assert same_bytes(weight.scales(), golden[f"{base}/absmax_fp32"])
    names = [
        f"{base}/{name}" for name in ("dequant", "dequant_float32", "dequant_float16") if f"{base}/{name}" in golden
    ]
    assert names
    for name in names:
        assert same_values(weight.dequantize(golden[name].dtype), golden[name].reshape(weight.shape)), name
    wrong = golden.get(f"{base}/dequant_bnb_WRONG")
    assert wrong is None or not same_values(weight.dequantize(wrong.dtype), wrong.reshape(weight.shape))


@pytest.mark.parametrize(NAMES, [row for row in CASES if row[1] not in OWN_RULE])
def test_quantized(golden: dict[str, Tensor], base: str, case: str, quant_type: str, block: str, nested: str) -> None:
    theirs = stored_weight(golden, base, case, quant_type, block)
    ours = qn.quantize(golden[f"in/{case}"], quant_type=quant_type, block_size=int(block), double_quant=nested == "1")
    if quant_type == "nf4":
        assert same_bytes(ours.packed, theirs.packed)
    else:  # bitsandbytes' CPU swaps the two zeros and shifts some boundaries by an ulp: then both are as near to x
        x = golden[f"in/{case}"].float()
        plain = qn.quantize(golden[f"in/{case}"], quant_type="fp4", block_size=int(block), double_quant=False)
        our_error = (plain.dequantize(torch.float32) - x).abs()
        plain.packed = theirs.packed
        their_error = (plain.dequantize(torch.float32) - x).abs()
        assert (our_error <= their_error + 1e-6 * x.abs().max()).all()
    if nested == "0":
        assert same_bytes(ours.absmax, theirs.absmax)
    else:  # theirs went through a 16-bit look-up: neighbors at most
        spread = theirs.scales().max() - theirs.scales().min()
        assert (ours.scales() - theirs.scales()).abs().max() <= 0.02 * spread + 1e-12


@pytest.mark.parametrize("name", ["logspread", "withzeros"])  # of whole nested blocks
def test_nested_codes_are_exact(golden: dict[str, Tensor], name: str) -> None:
    """Scales whose mean is zero go through the same 8-bit rounding as bitsandbytes' blockwise quantization."""
    x = golden[f"b8/{name}/in"].reshape(-1).float()
    mirrored = torch.cat([x, -x])
    codes = torch.empty(mirrored.numel(), dtype=torch.uint8)
    absmax, offset = torch.empty(mirrored.numel() // 256), torch.empty(())
    pointers = codes.data_ptr(), absmax.data_ptr(), offset.data_ptr()
    _native._C.quantize_scales(mirrored.data_ptr(), mirrored.numel(), *pointers)
    assert offset == 0
    all_zero = (x.reshape(-1, 256) == 0).all(1).repeat_interleave(256)  # there any code decodes to 0; ours is that of 0
    want = torch.where(all_zero, 127, golden[f"b8/{name}/codes_exact"].reshape(-1)).to(torch.uint8)
    assert torch.equal(codes[: x.numel()], want)
    assert same_bytes(absmax[: x.numel() // 256], golden[f"b8/{name}/absmax"].reshape(-1))


@pytest.mark.parametrize("name", sorted({key.split("/")[1] for key in KEYS if key.startswith("lin/")}))
def test_linear_layer(golden: dict[str, Tensor], name: str) -> None:
    """A layer saved by bitsandbytes loads, computes the same and saves the same bytes."""
    prefix = f"lin/{name}/"
    state = {key.removeprefix(prefix + "sd/"): value for key, value in golden.items() if key.startswith(prefix + "sd/")}
    layer = qn.nn.QuantizedLinear(64, 32, device="meta")
    layer.load_state_dict(state)
    saved = layer.state_dict()
    assert sorted(saved) == sorted(state)
    assert all(same_bytes(saved[key], state[key]) for key in state)

    x: Any = golden[prefix + "x"].clone().requires_grad_()
    y = layer(x)
    y.backward(golden[prefix + "grad_out"])
    assert y.dtype == golden[prefix + "y"].dtype
    assert relative_error(y, golden[prefix + "y"]) < TOLERANCE[x.dtype]
    assert relative_error(x.grad, golden[prefix + "grad_x"]) < TOLERANCE[x.dtype]
