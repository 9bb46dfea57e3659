"""qlora_native.bitsandbytes against bitsandbytes: tables, states, layers, and what one saved read by the other."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
from operator import attrgetter
from typing import Any

import pytest
import torch
from helpers import relative_error, same_bytes, same_values, through_a_file
from torch import Tensor, nn

import qlora_native as qn
import qlora_native.bitsandbytes as bnb
from qlora_native import reference

F: Any = bnb.functional  # Any: no assertion for the type checker beside those of the tests
STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def test_tables_are_theirs(theirs: Any) -> None:
    for name in ("nf4", "fp4"):
        assert torch.equal(F.get_4bit_type(name, "cpu"), theirs.functional.get_4bit_type(name, "cpu"))
    assert torch.equal(F.quantize_blockwise(torch.ones(2))[1].code, theirs.functional.create_dynamic_map())


NAMES = {f"{part}.{name}" for part in ("nn", "functional", "optim") for name in getattr(bnb, part).__all__}


def arguments_of(function: Any) -> list[Any]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["matmul_4bit", *sorted(NAMES - {"optim.native_state_dict"})])
def test_signatures_are_theirs(theirs: Any, name: str) -> None:
    """Names, order, defaults and what may be given by position; the paged forms take ``is_paged`` besides."""
    ours, other = (arguments_of(attrgetter(name)(package)) for package in (bnb, theirs))
    assert ours[: len(other)] == other
    assert [name for name, _, _ in ours[len(other) :]] in ([], ["is_paged"])


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_reads_what_the_other_made(
    theirs: Any, quant_type: str, nested: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(64, 128, dtype=dtype)
    options: Any = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage, "blocksize": 64}
    for one, other in ((F, theirs.functional), (theirs.functional, F)):
        packed, state = one.quantize_4bit(weight, **options)
        assert packed.dtype == storage
        stored = state.as_dict(packed=True)
        read = other.QuantState.from_dict(dict(stored), device=torch.device("cpu"))
        assert same_values(one.dequantize_4bit(packed, state), other.dequantize_4bit(packed, read))
        again = read.as_dict(packed=True)
        assert list(again) == list(stored)
        assert all(same_bytes(again[name], stored[name]) for name in stored)


def test_the_arithmetic_is_that_of_quantize() -> None:
    weight = torch.randn(6, 96, dtype=torch.bfloat16)  # rows that are no multiple of the block
    for nested in (False, True):
        packed, state = F.quantize_nf4(weight, compress_statistics=nested)
        same = qn.quantize(weight, double_quant=nested)
        assert torch.equal(packed.view(-1), same.packed)
        assert torch.equal(F.dequantize_4bit(packed, state), same.dequantize())
        out = torch.empty(6, 96, dtype=torch.bfloat16)
        assert F.dequantize_nf4(packed.t(), state, out=out) is out
        assert torch.equal(out, same.dequantize())
    packed, state = F.quantize_fp4(weight, blocksize=32)
    assert (state.blocksize, state.quant_type, len(state.absmax)) == (32, "fp4", 18)
    room = torch.empty_like(packed), torch.empty_like(state.absmax)
    filled, other = F.quantize_fp4(weight, out=room[0], absmax=room[1], blocksize=32)
    assert filled is room[0] and other.absmax is room[1] and other == state
    values = torch.empty(6, 96)
    F.dequantize_fp4(packed, absmax=state.absmax, out=values, blocksize=32)
    assert torch.equal(values.bfloat16(), F.dequantize_4bit(packed, state))


def test_levels_of_a_checkpoint_are_honored() -> None:
    weight = torch.randn(32, 64)
    packed, state = F.quantize_nf4(weight, compress_statistics=True)
    before = F.dequantize_4bit(packed, state)
    state.code = state.code * 0.5
    assert torch.equal(F.dequantize_4bit(packed, state), before * 0.5)
    state.state2.code = torch.zeros(256)  # all scales become their mean
    codes = torch.stack([packed >> 4, packed & 15], -1).reshape(32, 64).long()
    assert torch.equal(F.dequantize_4bit(packed, state), state.code[codes] * state.offset)


def test_nested_scales_in_blocks_of_another_size() -> None:
    packed, state = F.quantize_nf4(torch.randn(64, 128), compress_statistics=True)
    dense = F.dequantize_4bit(packed, state)
    codes, second = F.quantize_blockwise(state.scales() - state.offset, blocksize=64)
    state.absmax, state.state2 = codes, second
    assert relative_error(F.dequantize_4bit(packed, state), dense) < 0.02
    x = torch.randn(3, 128)
    assert relative_error(bnb.matmul_4bit(x, packed, state), x @ F.dequantize_4bit(packed, state).t()) < 2e-6


def test_state_compares_copies_and_travels() -> None:
    weight = torch.randn(32, 64)
    _, state = F.quantize_nf4(weight, compress_statistics=True)
    twins = copy.deepcopy(state), pickle.loads(pickle.dumps(state)), F.QuantState.from_dict(state.as_dict(), "cpu")
    assert all(twin == state for twin in twins)
    others = F.quantize_nf4(weight)[1], F.quantize_nf4(weight * 2, compress_statistics=True)[1], "state"
    assert all(state != other for other in others)
    assert state[0] is state.absmax and state[4] == [state.offset, state.state2]
    assert same_bytes(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
        _ = state.bitsandbytes__fp4
    stored = {f"layer.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    count = len(stored)
    assert F.QuantState.from_dict(stored, "cpu") == state
    assert len(stored) == count  # theirs takes one out


def test_mistakes_are_sentences() -> None:
    weight = torch.randn(32, 64)
    packed, state = F.quantize_nf4(weight)
    fields = state.as_dict(packed=True)
    rest = {name: value for name, value in fields.items() if name != "absmax"}
    cases: list[tuple[str, Any]] = [
        ("quant_type is 'int4': expected 'nf4' or 'fp4'", lambda: F.quantize_4bit(weight, quant_type="int4")),
        ("block_size is 48: expected a power of two", lambda: F.quantize_4bit(weight, blocksize=48)),
        ("t is torch.float64", lambda: F.quantize_4bit(weight.double())),
        (r"element \[0, 1\] of the \[1, 2\] tensor is nan", lambda: F.quantize_4bit(torch.tensor([[1.0, torch.nan]]))),
        ("3 packed bytes are no whole number", lambda: F.quantize_4bit(torch.randn(6), quant_storage=torch.float32)),
        ("both absmax and out are needed", lambda: F.dequantize_4bit(packed, absmax=state.absmax)),
        ("give the state that quantize_4bit returned", lambda: bnb.matmul_4bit(weight, packed, None)),
        ("give the state that quantize_4bit returned", lambda: F.gemv_4bit(weight, packed)),
        ("expected two dimensions", lambda: bnb.matmul_4bit(weight, *F.quantize_nf4(torch.randn(64)))),
        (r"x is torch.float32 \[2, 60\] .*64\]", lambda: bnb.matmul_4bit(torch.randn(2, 60), packed, state)),
        ("may be packed under one that ends in", lambda: F.QuantState.from_dict({"absmax": state.absmax}, "cpu")),
        ("missing keys: absmax;", lambda: F.QuantState.from_dict(rest, "cpu")),
        ("unknown keys: extra", lambda: F.QuantState.from_dict({**fields, "extra": 1}, "cpu")),
        ("holds no quant state", lambda: F.QuantState.from_dict({"quant_state.x": torch.tensor([1, 2]).byte()}, "cpu")),
        ("blocksize is 0", lambda: F.quantize_blockwise(weight, blocksize=0)),
        ("A is torch.int32", lambda: F.quantize_blockwise(weight.int())),
        ("A is torch.float32: expected uint8", lambda: F.dequantize_blockwise(weight, absmax=state.absmax)),
        ("quant_state or absmax is needed", lambda: F.dequantize_blockwise(packed)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(NotImplementedError, match="'int4': expected 'nf4' or 'fp4'"):
        F.get_4bit_type("int4")


def test_product_and_gradients() -> None:
    packed, state = F.quantize_nf4(torch.randn(33, 96), compress_statistics=True)
    dense = reference.dequantize(torch.float32, *state.op_args(packed))
    x: Any = torch.randn(2, 5, 96, requires_grad=True)
    bias: Any = torch.randn(33, requires_grad=True)
    y = bnb.matmul_4bit(x, packed.t(), state, bias=bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert relative_error(y, reference.linear(x, dense, bias)) < 2e-6
    assert relative_error(x.grad, grad.double() @ dense.double()) < 2e-6
    assert relative_error(bias.grad, grad.double().sum((0, 1))) < 2e-6
    with torch.no_grad():
        out = torch.empty(2, 5, 33)
        assert bnb.matmul_4bit(x, packed, state, out=out, bias=bias) is out
        assert torch.equal(out, y)
        assert torch.equal(F.gemv_4bit(x, packed, state=state), bnb.matmul_4bit(x, packed, state))
    assert bnb.matmul_4bit(torch.randn(0, 96), packed, state).shape == (0, 33)


def test_a_long_fp32_product_is_nearer_to_the_truth_than_bitsandbytes_asks() -> None:
    """Their test_gemv_4bit compares with torch's product, and fails for torch's own error on a CPU."""
    packed, state = F.quantize_nf4(torch.randn(1024, 4096) / 32)
    x = torch.randn(1, 4096)
    truth = x.double() @ F.dequantize_4bit(packed, state).double().t()
    assert (F.gemv_4bit(x, packed, state=state) - truth).abs().mean() / 32 < 2.4e-8


def test_a_transposed_weight_warns_and_works() -> None:
    packed, state = F.quantize_nf4(torch.randn(96, 32))
    x = torch.randn(3, 96)
    with pytest.warns(DeprecationWarning, match=r"Re-quantize from the weight in \[N, K\]"):
        y = bnb.matmul_4bit(x, packed, state)
    assert relative_error(y, x @ F.dequantize_4bit(packed, state)) < 2e-6


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["LinearNF4", "LinearFP4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_computes_and_saves_what_theirs_does(theirs: Any, kind: str, nested: bool, dtype: torch.dtype) -> None:
    dense = nn.Linear(128, 48).to(dtype)
    their = getattr(theirs.nn, kind)(128, 48, compute_dtype=dtype, compress_statistics=nested)
    their.load_state_dict(dense.state_dict())
    their.to("cpu").train()
    stored = {name: value.clone() for name, value in their.state_dict().items()}
    our = getattr(bnb.nn, kind)(128, 48, compute_dtype=dtype, compress_statistics=nested)
    our.load_state_dict(stored)
    saved = our.state_dict()
    assert list(saved) == list(stored)
    assert all(same_bytes(saved[name], stored[name]) for name in stored)
    x = torch.randn(7, 128, dtype=dtype)
    inputs: Any = [x.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn(7, 48, dtype=dtype)
    for layer, given in zip((our, their), inputs, strict=True):
        layer(given).backward(grad)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(our(x), their(x.clone().requires_grad_())) < tolerance
    assert relative_error(inputs[0].grad, inputs[1].grad) < tolerance
    assert relative_error(our.bias.grad, their.bias.grad) < tolerance


def test_evaluation_changes_no_byte() -> None:
    """Where the CPU has AVX512-BF16, theirs repacks the weight in the first evaluation forward."""
    for rows, columns in ((64, 128), (33, 96)):
        layer = bnb.nn.LinearNF4(columns, rows, bias=False, compute_dtype=torch.bfloat16).to("cpu")
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.randn(4, columns)
        trained = layer.train()(x)
        assert torch.equal(layer.eval()(x), trained)
        after = layer.state_dict()
        assert all(same_bytes(after[name], before[name]) for name in before)


def test_compute_dtype_and_bias() -> None:
    layer: Any = bnb.nn.LinearNF4(64, 32).to("cpu")
    assert getattr(layer, "compute_dtype", 0) is None
    y = layer(torch.randn(2, 64, dtype=torch.bfloat16))
    assert (y.dtype, layer.compute_dtype, layer.bias.dtype) == (torch.bfloat16,) * 3
    assert layer(torch.randn(2, 64)).dtype == torch.float32
    half = bnb.nn.LinearNF4(64, 32, compute_dtype=torch.float32).to("cpu")
    assert half(torch.randn(2, 64, dtype=torch.float16)).dtype == torch.float16


def test_packed_bytes_are_never_cast() -> None:
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    before = layer.weight.data.clone()
    layer.half()
    layer.to(torch.float32)
    layer.to("cpu", torch.float16)
    assert same_bytes(layer.weight.data, before)
    assert layer.bias.dtype == torch.float16


def test_parameter_copies_and_pieces() -> None:
    parameter: Any = bnb.nn.Params4bit(torch.randn(32, 64), quant_type="nf4", blocksize=128).to("cpu")
    assert parameter.bnb_quantized and parameter.absmax is parameter.quant_state.absmax
    twins = copy.copy(parameter), copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))
    for twin in (*twins, through_a_file(parameter, weights_only=False)):
        assert type(twin) is bnb.nn.Params4bit and torch.equal(twin, parameter)
        assert twin.quant_state == parameter.quant_state and twin.blocksize == 128
    for piece in torch.chunk(parameter, 4):
        assert type(piece) is bnb.nn.Params4bit and piece.quant_state is parameter.quant_state
    plain = bnb.nn.Params4bit(torch.randn(4, 4))
    with pytest.raises(AttributeError, match="no attribute 'absmax'"):
        _ = plain.absmax


def test_a_layer_is_copied_with_its_own_state() -> None:
    layer = bnb.nn.LinearNF4(64, 32).to("cpu")
    x = torch.randn(2, 64)
    for twin in (copy.deepcopy(layer), through_a_file(layer, weights_only=False)):
        assert twin.weight.module is twin
        assert twin.weight.quant_state is twin.quant_state is not layer.quant_state
        assert torch.equal(twin(x), layer(x))


def test_a_layer_without_a_state() -> None:
    """One that was never quantized, and one whose weight a wrapper such as FSDP replaced by a plain parameter."""
    with pytest.raises(RuntimeError, match=r"Linear4bit\(64, 32\)"):
        bnb.nn.Linear4bit(64, 32)(torch.randn(1, 64))
    layer: Any = bnb.nn.LinearNF4(64, 32).to("cpu")
    x = torch.randn(3, 64)
    y = layer(x)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), y) and isinstance(layer.weight, bnb.nn.Params4bit)


@pytest.mark.parametrize("name", ["normal", "logspread", "withzeros"])
def test_blockwise_codes_are_the_nearest(golden: dict[str, Tensor], name: str) -> None:
    values = golden[f"b8/{name}/in"]
    codes, state = F.quantize_blockwise(values, blocksize=256)
    decoded = F.dequantize_blockwise(codes, state)
    assert same_bytes(state.absmax, golden[f"b8/{name}/absmax"].reshape(-1))
    expected = golden[f"b8/{name}/codes_exact"].reshape(codes.shape)
    zero = (state.absmax == 0).repeat_interleave(256)[: values.numel()].reshape(codes.shape)
    assert torch.equal(codes[~zero], expected[~zero])
    assert not decoded[zero].any()


def test_blockwise_states_are_theirs(theirs: Any) -> None:
    values = torch.randn(300, 70, dtype=torch.bfloat16)
    for nested, (one, other) in itertools.product((False, True), ((F, theirs.functional), (theirs.functional, F))):
        codes, state = one.quantize_blockwise(values, blocksize=512, nested=nested)
        read = other.QuantState.from_dict(state.as_dict(), device=torch.device("cpu"))
        assert same_values(one.dequantize_blockwise(codes, state), other.dequantize_blockwise(codes, read))
    linear = torch.linspace(-1, 1, 256)
    codes, state = F.quantize_blockwise(values, linear, blocksize=100)
    scaled = (values.double().reshape(-1, 100) / state.absmax[:, None]).reshape(-1, 1)
    distance = (linear[None] - scaled).abs()
    chosen = distance.gather(1, codes.long().reshape(-1, 1))[:, 0]
    assert (chosen - distance.min(1).values).max() < 1e-7


def test_names_that_are_not_offered() -> None:
    for module, name, offered in (
        (bnb, "matmul", "matmul_4bit"),
        (bnb.nn, "Linear8bitLt", "LinearNF4"),
        (bnb.functional, "igemm", "quantize_4bit"),
        (bnb.optim, "LAMB", "AdamW8bit"),
        (bnb.functional, "create_fp8_map", "without code"),
        (bnb.optim, "GlobalOptimManager", "'bits': 32"),
    ):
        with pytest.raises(AttributeError, match=f"{name}.*{offered}"):
            getattr(module, name)


def test_ops_on_request() -> None:
    """In a process that has imported nothing else, and neither bitsandbytes nor transformers with this package."""
    code = """
import sys, torch, qlora_native.bitsandbytes as bnb
assert not {"bitsandbytes", "transformers"} & sys.modules.keys()
assert not hasattr(torch.ops.bitsandbytes, "quantize_4bit")
bnb.register_ops(); bnb.register_ops()
w = torch.randn(32, 64)
packed, absmax = torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
dense = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", [32, 64], torch.float32)
x = torch.randn(3, 64)
y = torch.ops.bitsandbytes.gemm_4bit(x, packed, [32, 64], absmax, 64, "nf4")
assert torch.allclose(y, x @ dense.t(), atol=1e-4)
torch.library.opcheck(torch.ops.bitsandbytes.gemm_4bit.default, (x, packed, [32, 64], absmax, 64, "nf4"))
out = torch.empty(32, 64)
assert torch.ops.bitsandbytes.dequantize_4bit.out(packed, absmax, 64, "nf4", [32, 64], torch.float32, out=out) is None
assert torch.equal(out, dense)
table = torch.linspace(-1, 1, 256)
codes, scales = torch.ops.bitsandbytes.quantize_blockwise(w, table, 256)
arguments = codes, scales, table, 256, torch.float32
torch.ops.bitsandbytes.dequantize_blockwise.out(*arguments, out=out)
assert torch.equal(out, torch.ops.bitsandbytes.dequantize_blockwise(*arguments))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_ops_do_not_meet_theirs(theirs: Any) -> None:
    with pytest.raises(RuntimeError, match="bitsandbytes has been imported"):
        bnb.register_ops()
