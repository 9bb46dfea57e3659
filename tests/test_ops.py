"""What holds for every op: its schema and fake, derivatives, operands in any layout, the same bytes on any threads."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from calls import CALLS, OPS, Sizes, calls, is_of_weight, layouts, op_of, overload_of, places, with_other
from cases import FLOAT_DTYPES
from helpers import SavedTensors, relative_error, same_bytes, same_bytes_under_threads
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _direct
from qlora_native.ops._library import FROZEN, SCHEMAS
from qlora_native.ops._operands import Weight

pytestmark = [pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]

# The arguments of each op that may want a gradient.
DIFFERENTIABLE = {
    "linear_4bit": (0, 1),
    "linear_4bit_grad_input": (0,),
    "lora_linear_4bit": (0, 1, 2, 3, 5),
    "experts_4bit": (0, 3, 4),
    "dense_linear": (0, 1, 2),
    "dense_linear_grad_input": (0, 1),
    "dense_linear_grad_weight": (0, 1),
    "linear_cross_entropy": (0, 5, 7),
    "causal_attention": (0, 1, 2),
    "rms_norm": (0, 1),
    "rotary": (0,),
    "swiglu": (0, 1),
}


def test_every_op_is_called() -> None:
    assert {op_of(call) for call in CALLS} == {*SCHEMAS}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    """In bf16, beside which adapters, biases and scales are fp32."""
    arguments = calls(dtype=torch.bfloat16)[call]()
    for i in DIFFERENTIABLE.get(op_of(call), ()):
        if isinstance(arguments[i], Tensor) and arguments[i].is_floating_point():
            arguments[i].requires_grad_()
    torch.library.opcheck(overload_of(call), tuple(arguments))


# Rows of a head are multiplied by torch, in an order that depends on the strides.
BY_TORCH = ("linear_cross_entropy rows", "linear_cross_entropy iq4_nl")


def results(call: str, arguments: list[Any]) -> list[Tensor]:
    """What a call returns, or the tensors that it wrote to."""
    found = overload_of(call)(*arguments)
    if isinstance(found, Tensor):
        return [found]
    return list(found or (tensor for _, _, tensor in places(arguments)))


@pytest.mark.isa
@pytest.mark.parametrize("call", [call for call in CALLS if call not in BY_TORCH])
def test_layouts_change_no_byte(call: str) -> None:
    def given() -> list[Any]:
        torch.manual_seed(1)
        return calls(dtype=torch.bfloat16)[call]()

    expected = results(call, given())
    for i, inner, tensor in places(given()):
        if is_of_weight(call, given(), i):
            continue
        for layout, other in layouts(tensor):
            if inner is not None and i > 1 and not other.is_contiguous():
                continue  # the state of a parameter
            found = results(call, with_other(given(), i, inner, other))
            assert all(map(same_bytes, found, expected)), (i, layout)


@pytest.mark.isa
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_threads_and_repeats_change_no_byte(call: str, dtype: torch.dtype) -> None:
    # Torch multiplies a head's rows and dense weight, and x A^T in fp32: the same bytes under as many threads alone.
    by_torch = call in (*BY_TORCH, "linear_cross_entropy dense")
    by_torch = by_torch or (op_of(call) == "lora_linear_4bit" and dtype == torch.float32)
    for m in (1, 3, 64, 301):
        sizes = Sizes(m, 300, 512, 8, 70, ((10, 10), (700, 100), (40_001, 1)))
        torch.manual_seed(1)
        arguments = calls(sizes, dtype)[call]()

        def run(arguments: list[Any] = arguments) -> list[Tensor]:
            return results(call, [deepcopy(value) for value in arguments])

        same_bytes_under_threads(run, (2, 2, 2) if by_torch else (1, 2, 5))


# For the gradients of these arguments, backward has those arguments, and tensors of these shapes beside them.
KEPT: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, ...]]]] = {
    "linear_4bit": ((0, 1), (2, 3, 4, 5), []),
    "lora_linear_4bit plain": ((0, 2, 3), (0, 2, 3, 6, 7, 8, 9), [(3, 4)]),  # x A^T
    "experts_4bit": ((0, 3, 4), (0, 1, 2, 3, 4, 6, 7, 8, 9), [(3, 4)]),
    "dense_linear": ((0,), (1,), []),
    "linear_cross_entropy": ((0,), (1,), [(3, 64), (0,)]),  # the gradients themselves
    "linear_cross_entropy rows": ((0, 5), (1,), [(3, 64), (4, 64)]),
    "causal_attention": ((0,), (0, 1, 2), [(2, 4, 5, 16), (2, 4, 5)]),  # the output, and one number a row of it
    "rms_norm": ((0,), (0, 1), [(3,)]),
    "rotary": ((0,), (1, 2), []),
    "swiglu": ((0, 1), (0, 1), []),
}


@pytest.mark.parametrize("is_direct", [False, True], ids=["dispatcher", "direct"])
@pytest.mark.parametrize("call", KEPT)
def test_what_is_kept_for_backward(call: str, is_direct: bool) -> None:
    wanted, kept, beside = KEPT[call]
    arguments = calls(dtype=torch.bfloat16)[call]()
    for i in wanted:
        arguments[i].requires_grad_()
    with SavedTensors() as saved:
        if is_direct and op_of(call) in FROZEN:
            _direct.call(op_of(call), *arguments[:-9], Weight(*arguments[-9:]))
        elif is_direct:
            _direct.call(op_of(call), *arguments)
        else:
            overload_of(call)(*arguments)
    found = {t.data_ptr(): tuple(t.shape) for t in saved.tensors}
    assert [found.pop(arguments[i].data_ptr()) for i in kept]
    assert sorted(found.values()) == sorted(beside)


def lora_linear(w: qn.QuantizedWeight, x: Tensor, a: Tensor, b: Tensor, bias: Tensor, x_lora: Tensor) -> Tensor:
    return qn.lora_linear(x, w, a, b, 0.5, bias, x_lora) + qn.lora_linear(x, w, a, b, 0.5)


def loss(_: qn.QuantizedWeight, h: Tensor, dense: Tensor) -> Tensor:
    return qn.linear_cross_entropy(h, dense, torch.tensor([0, 10, -100, 3, 3, 7]))


def loss_of_rows(_: qn.QuantizedWeight, h: Tensor, rows: Tensor) -> Tensor:
    labels, ids = torch.tensor([0, 5, -100, 3, 3, 1]), torch.tensor([5, 1])
    return qn.linear_cross_entropy(h, torch.linspace(-1, 1, 30).double().view(6, 5), labels, -100, rows, ids)


def rotary(_: qn.QuantizedWeight, x: Tensor) -> Any:
    cos, sin = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 1, 3, 4)  # both halves of the angles differ
    return OPS.rotary(x, cos, sin, False)


def experts(_: qn.QuantizedWeight, *operands: Tensor) -> Tensor:
    """Rows of a token for two experts and for none, in a stack of its own."""
    stack = qn.quantize(torch.linspace(-1, 1, 64).view(2, 4, 8), block_size=32).op_args()
    x, *factors = operands
    token, offsets = torch.tensor([0, 2, 1, 0, 1]), torch.tensor([0, 3, 4])
    return OPS.experts_4bit(x, token, offsets, *factors, 0.5, *stack)[0]


# Functions of a weight [6, 8] and of leaves of these shapes, of which so many, the first, have second derivatives.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], int]] = {
    "linear": (lambda w, x, bias: qn.linear(x, w, bias), ((3, 8), (6,)), 2),
    "lora_linear": (lora_linear, ((3, 8), (2, 8), (6, 2), (6,), (3, 8)), 5),
    "experts_4bit": (experts, ((3, 8), (2, 2, 8), (2, 4, 2)), 3),
    "dense_linear": (lambda _, *x: OPS.dense_linear(*x), ((3, 5), (4, 5), (4,)), 3),
    "linear_cross_entropy": (loss, ((6, 5), (11, 5)), 0),
    "linear_cross_entropy rows": (loss_of_rows, ((6, 5), (2, 5)), 0),
    "swiglu": (lambda _, *x: OPS.swiglu(*x), ((3, 5), (3, 5)), 2),
    "rms_norm": (lambda _, *x: OPS.rms_norm(*x, 1e-5)[0], ((3, 7), (7,)), 1),
    "rotary": (rotary, ((1, 2, 3, 4),), 1),
    "causal_attention": (lambda _, *x: OPS.causal_attention(*x, 0.4)[0], ((1, 2, 4, 4), (1, 1, 4, 4), (1, 1, 4, 4)), 3),
}


def function_and_leaves(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    function, shapes, _ = FUNCTIONS[name]
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return partial(function, qn.quantize(torch.randn(6, 8), block_size=32)), leaves


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name: str) -> None:
    function, leaves = function_and_leaves(name, torch.float64)
    assert torch.autograd.gradcheck(function, leaves)
    twice = FUNCTIONS[name][2]
    for leaf in leaves[twice:]:
        leaf.requires_grad_(False)
    assert not twice or torch.autograd.gradgradcheck(lambda *x: function(*x) ** 2, leaves)


@pytest.mark.parametrize("name", ["linear", "lora_linear"])
def test_autocast(name: str, device: str) -> None:
    function, leaves = function_and_leaves(name, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = function(*leaves)
    assert y.dtype == torch.bfloat16
    assert {grad.dtype for grad in torch.autograd.grad(y.sum(), leaves)} == {torch.float32}


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("name", ["linear", "lora_linear", "linear_cross_entropy"])
def test_compiles_without_breaks(name: str, backend: str) -> None:
    torch._dynamo.reset()
    function, leaves = function_and_leaves(name, torch.float32)
    compiled = torch.compile(lambda *x: torch.relu(function(*x)) * 2, fullgraph=True, backend=backend)
    got, want = compiled(*leaves), torch.relu(function(*leaves)) * 2
    assert relative_error(got, want) < 1e-6
    gradients = (torch.autograd.grad(y.sum(), leaves) for y in (got, want))
    assert max(map(relative_error, *gradients)) < 1e-6
