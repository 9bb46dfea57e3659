"""QuantizedLinear as a module: state_dict, casts, moves, training."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative_error, same_bytes, same_weight

import qlora_native as qn
from qlora_native.nn import QuantizedLinear


def layer(bias: bool = True, **options: object) -> QuantizedLinear:
    return QuantizedLinear.from_linear(torch.nn.Linear(64, 32, bias=bias), **options)


def same_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(map(same_bytes, a.values(), b.values()))


def test_from_linear_and_back() -> None:
    dense = torch.nn.Linear(64, 32)
    quantized = QuantizedLinear.from_linear(dense, quant_type="fp4", block_size=32)
    back = quantized.dequantize()
    assert type(back) is torch.nn.Linear
    x = torch.randn(3, 64)
    assert relative_error(back(x), quantized(x)) < 1e-6
    assert relative_error(back.weight, dense.weight) < 0.2
    assert back.bias is dense.bias
    assert isinstance(quantized, torch.nn.Linear)
    assert "fp4, block_size=32, double_quant=True" in repr(quantized)
    weight = quantized.weight
    assert (weight.dtype, tuple(weight.shape), weight.requires_grad) == (torch.uint8, (1024, 1), False)
    assert [name for name, _ in quantized.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(double_quant: bool, bias: bool) -> None:
    source = layer(bias, double_quant=double_quant)
    state = source.state_dict()
    assert set(state) == {*qn.to_bnb(source.quantized), *(["bias"] if bias else [])}
    for device in (None, "meta"):
        target = QuantizedLinear(64, 32, bias, double_quant=not double_quant, dtype=torch.float32, device=device)
        target.load_state_dict(state)
        assert same_states(target.state_dict(), state)
        x = torch.randn(3, 64)
        assert torch.equal(target(x), source(x))


def test_loading_a_dense_weight_quantizes_it() -> None:
    dense = torch.nn.Linear(64, 32)
    target = layer(block_size=32)
    target.load_state_dict(dense.state_dict())
    assert same_bytes(target.quantized.packed, qn.quantize(dense.weight, block_size=32).packed)


def test_strict_loading_reports() -> None:
    state = layer().state_dict()
    without = {name: {key: state[key] for key in state if key != name} for name in ("bias", "weight.absmax")}
    for target, changed, expected in (
        (layer(), without["bias"], "Missing key.*bias"),
        (layer(), {**state, "extra": torch.zeros(1)}, "Unexpected key.*extra"),
        (layer(), without["weight.absmax"], "key 'weight.absmax' is missing"),
        (QuantizedLinear(32, 64), state, r"the weight is \[32, 64\], expected \[64, 32\]"),
    ):
        with pytest.raises(RuntimeError, match=expected):
            target.load_state_dict(changed)


@torch.no_grad()
def test_loading_inside_a_model_copies() -> None:
    model, other = (torch.nn.Sequential(layer(), torch.nn.ReLU(), torch.nn.Linear(32, 4)) for _ in range(2))
    x = torch.randn(3, 64)
    expected = model(x)
    other.load_state_dict(model.state_dict())
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(x), expected) and not torch.equal(model(x), expected)


def test_casts_change_no_scale() -> None:
    for double_quant in (False, True):
        quantized = layer(double_quant=double_quant)
        before = quantized.quantized
        for dtype in (torch.half, torch.bfloat16, torch.double, torch.float):
            assert same_weight(quantized.to(dtype).quantized, before)
        assert quantized.bias.dtype == torch.float32


def test_made_under_a_16_bit_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert QuantizedLinear(64, 32, double_quant=False).absmax.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_evaluation_changes_nothing() -> None:
    quantized = layer()
    before = copy.deepcopy(quantized.state_dict())
    quantized.eval()
    with torch.inference_mode():
        quantized(torch.randn(1, 64))
    quantized.train()
    x = torch.randn(3, 64, requires_grad=True)
    quantized(x).sum().backward()
    assert x.grad is not None and quantized.weight.grad is None and quantized.bias.grad is not None
    assert same_states(quantized.state_dict(), before)
