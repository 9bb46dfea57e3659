"""linear_4bit and its input gradient against fp64 on the same dequantized weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import FLOAT_DTYPES, GGUF_PRODUCTS, GGUF_TYPES, PRODUCTS, QUANT_TYPES, TOLERANCE, Product
from helpers import gguf_truth, gguf_weight, refuses, relative_error, signed
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.ops import linear_4bit

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
DTYPES = tuple(TOLERANCE)
FEW_TOKENS = [Product(m, 7, 2304, 1) for m in (1, 2, 3, 5, 8, 9)]  # rows longer than are decoded at a time


def decoded(w: qn.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as the op must see it: rounded once, straight to x's dtype."""
    stored = torch.float32 if dtype == torch.float64 else dtype
    values = reference.dequantize(stored, *w.op_args()) if w.quant_type in QUANT_TYPES else gguf_truth(w)
    return values.to(stored).to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check(w: qn.QuantizedWeight, m: int, dtype: torch.dtype, with_bias: bool) -> None:
    """Forward and gradients of m tokens."""
    n, k = w.shape
    x, dense = random(m, k, dtype=dtype).requires_grad_(), decoded(w, dtype)
    bias = random(n, dtype=dtype).requires_grad_() if with_bias else None
    y = qn.linear(x, w, bias)
    assert y.dtype == dtype and y.shape == (m, n)
    assert relative_error(y, reference.linear(x, dense, bias)) < TOLERANCE[dtype], m
    grad_y = random(m, n, dtype=dtype)
    y.backward(grad_y)
    assert relative_error(x.grad, grad_y.double() @ dense.double()) < TOLERANCE[dtype], m
    assert bias is None or relative_error(bias.grad, grad_y.double().sum(0)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_forward_and_gradients(case: Product, dtype: torch.dtype) -> None:
    for quant_type, with_bias in itertools.product(QUANT_TYPES, (False, True)):
        w = qn.quantize(torch.randn(case.n, case.k) / case.k**0.5, quant_type=quant_type)
        check(signed(w) if with_bias else w, case.m, dtype, with_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_forward_and_gradients(quant_type: str, dtype: torch.dtype) -> None:
    for case, with_bias in itertools.product((*GGUF_PRODUCTS, *FEW_TOKENS), (False, True)):
        check(gguf_weight(quant_type, (case.n, case.k)), case.m, dtype, with_bias)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_few_tokens(dtype: torch.dtype) -> None:
    """Every number of rows about the native kernel's limit, rows longer than it decodes at a time, odd shapes."""
    for m, (n, k) in itertools.product(range(19), ((1, 64), (7, 2100), (33, 4133))):
        w = qn.quantize(torch.randn(n, k) / k**0.5)
        w = signed(w) if m % 2 and n > 1 else w  # one sum of one block may cancel against the bias
        x, bias = random(m, k, dtype=dtype), random(n, dtype=dtype)
        for b in (None, bias):
            want = reference.linear(x, decoded(w, dtype), b)
            assert relative_error(qn.linear(x, w, b), want) < TOLERANCE[dtype], (m, n, k)


@pytest.mark.parametrize("shape", [(192,), (2, 3, 192), (2, 0, 192), (1, 1, 1, 192)], ids=str)
def test_leading_dimensions_and_an_expanded_gradient(shape: tuple[int, ...]) -> None:
    w = qn.quantize(torch.randn(40, 192))
    x, dense = torch.randn(shape, requires_grad=True), decoded(w, torch.float32)
    y = qn.linear(x, w)
    y.sum().backward()  # of stride 0
    assert y.shape == (*shape[:-1], 40)
    assert relative_error(y, reference.linear(x, dense)) < TOLERANCE[torch.float32]
    assert relative_error(x.grad, dense.double().sum(0).expand(shape)) < TOLERANCE[torch.float32]


@pytest.mark.devices("cpu")
def test_float64_by_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small panels split both products many times, at places that are no multiple of a block."""
    monkeypatch.setattr(linear_4bit, "PANEL_BYTES", 8 * 195 * 7)
    check(qn.quantize(torch.randn(300, 195)), 20, torch.float64, with_bias=True)


def test_a_weight_of_one_dimension_is_refused() -> None:
    refuses(r"weight is \[192\]", qn.linear, torch.randn(8, 192), qn.quantize(torch.randn(192)))


def test_backward_twice() -> None:
    y = qn.linear(torch.randn(4, 128, requires_grad=True), qn.quantize(torch.randn(64, 128)))
    y.sum().backward(retain_graph=True)
    y.sum().backward()


@pytest.mark.devices("cpu", "cuda")
def test_compiles_without_breaks(backend: str) -> None:
    torch._dynamo.reset()
    layer = qn.nn.QuantizedLinear.from_linear(torch.nn.Linear(64, 32))
    x = torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(lambda t: torch.relu(layer(t)) * 2, fullgraph=True, backend=backend)
    y, want = compiled(x), torch.relu(layer(x)) * 2
    assert relative_error(y, want) < 1e-6
    assert relative_error(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, want))) < 1e-6
