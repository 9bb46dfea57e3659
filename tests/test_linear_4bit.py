"""linear_4bit and its input gradient against fp64 on the same dequantized weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import GGUF_PRODUCTS, GGUF_TYPES, PRODUCTS, QUANT_TYPES, TOLERANCE, Product
from helpers import SavedTensors, gguf_truth, gguf_weight, refuses, relative_error, same_bytes_under_threads, signed
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.ops import linear_4bit

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
DTYPES = tuple(TOLERANCE)
FEW_TOKENS = [Product(m, 7, 2304, 1) for m in (1, 2, 3, 5, 8, 9)]  # rows longer than are decoded at a time


def operands(case: Product, dtype: torch.dtype, **options: object) -> tuple[Tensor, qn.QuantizedWeight, Tensor]:
    w = qn.quantize(torch.randn(case.n, case.k) / case.k**0.5, **options)  # type: ignore[arg-type]
    x = torch.randn(case.m, case.k, dtype=torch.float64).to(dtype)
    return x, w, torch.randn(case.n).to(dtype)


def decoded(w: qn.QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as the op must see it: rounded once, straight to x's dtype."""
    stored = torch.float32 if dtype == torch.float64 else dtype
    return reference.dequantize(stored, *w.op_args()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_forward_and_gradients(case: Product, dtype: torch.dtype) -> None:
    for quant_type, with_bias in itertools.product(QUANT_TYPES, (False, True)):
        x, w, bias = operands(case, dtype, quant_type=quant_type)
        w = signed(w) if with_bias else w
        x.requires_grad_()
        b = bias.requires_grad_() if with_bias else None
        y = qn.linear(x, w, b)
        dense = decoded(w, dtype)
        assert y.dtype == dtype and y.shape == (case.m, case.n)
        assert relative_error(y, reference.linear(x, dense, b)) < TOLERANCE[dtype]
        grad_y = torch.randn(case.m, case.n, dtype=torch.float64).to(dtype)
        y.backward(grad_y)
        assert relative_error(x.grad, grad_y.double() @ dense.double()) < TOLERANCE[dtype]
        assert b is None or relative_error(b.grad, grad_y.double().sum(0)) < TOLERANCE[dtype]


@pytest.mark.devices("cpu", "cuda", "emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_forward_and_gradients(quant_type: str, dtype: torch.dtype) -> None:
    for case, with_bias in itertools.product((*GGUF_PRODUCTS, *FEW_TOKENS), (False, True)):
        w = gguf_weight(quant_type, (case.n, case.k))
        x = torch.randn(case.m, case.k, dtype=torch.float64).to(dtype).requires_grad_()
        b = torch.randn(case.n).to(dtype) if with_bias else None
        dense = gguf_truth(w).to(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
        y = qn.linear(x, w, b)
        assert relative_error(y, reference.linear(x, dense, b)) < TOLERANCE[dtype], case
        grad_y = torch.randn(case.m, case.n, dtype=torch.float64).to(dtype)
        y.backward(grad_y)
        assert relative_error(x.grad, grad_y.double() @ dense.double()) < TOLERANCE[dtype], case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_tokens(dtype: torch.dtype) -> None:
    """Every number of rows about the native kernel's limit, rows longer than it decodes at a time, odd shapes."""
    for m in range(19):
        for n, k in ((1, 64), (7, 2100), (33, 4133)):
            x, w, bias = operands(Product(m, n, k, 1), dtype)
            w = signed(w) if m % 2 and n > 1 else w  # one sum of one block may cancel against the bias
            for b in (None, bias):
                want = reference.linear(x, decoded(w, dtype), b)
                assert relative_error(qn.linear(x, w, b), want) < TOLERANCE[dtype], (m, n, k)


@pytest.mark.parametrize("shape", [(192,), (2, 3, 192), (2, 0, 192), (1, 1, 1, 192)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    w = qn.quantize(torch.randn(40, 192))
    x = torch.randn(shape, requires_grad=True)
    y = qn.linear(x, w)
    assert y.shape == (*shape[:-1], 40)
    assert relative_error(y, reference.linear(x, decoded(w, x.dtype))) < TOLERANCE[torch.float32]
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_non_contiguous_and_expanded_operands() -> None:
    w = qn.quantize(torch.randn(40, 192))
    dense = decoded(w, torch.float32)
    x = torch.randn(192, 9).t()
    grad = torch.randn(40, 1).expand(40, 9).t()  # stride 0, as the gradient of a sum
    leaf = x.clone().requires_grad_()
    y = qn.linear(leaf.t().contiguous().t(), w)
    y.backward(grad)
    assert relative_error(qn.linear(x, w), reference.linear(x, dense)) < TOLERANCE[torch.float32]
    assert relative_error(leaf.grad, grad.double() @ dense.double()) < TOLERANCE[torch.float32]


@pytest.mark.devices("cpu")
def test_float64_by_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small panels split both products many times, at places that are no multiple of a block."""
    x, w, bias = operands(Product(20, 300, 195, 4), torch.float64)
    grad = torch.randn(20, 300, dtype=torch.float64)
    monkeypatch.setattr(linear_4bit, "PANEL_BYTES", 8 * 195 * 7)
    leaf = x.requires_grad_()
    y = qn.linear(leaf, w, bias)
    y.backward(grad)
    dense = decoded(w, torch.float64)
    assert relative_error(y, x @ dense.t() + bias) < 1e-14
    assert relative_error(leaf.grad, grad @ dense) < 1e-14


def test_gradcheck_twice() -> None:
    w = qn.quantize(torch.randn(6, 8), block_size=32)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: qn.linear(x, w, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: qn.linear(x, w, b) ** 2, (x, bias))


def test_backward_twice_and_nothing_dense_saved() -> None:
    w = qn.quantize(torch.randn(64, 128))
    with SavedTensors() as saved:
        y = qn.linear(torch.randn(4, 128, requires_grad=True), w)
    assert sum(t.numel() * t.element_size() for t in saved.tensors) <= w.nbytes
    y.sum().backward(retain_graph=True)
    y.sum().backward()


def test_refuses_in_words() -> None:
    w = qn.quantize(torch.randn(40, 192))
    x = torch.randn(8, 192)
    refuses(r"x is torch.float32 \[8, 190\] .*\[8, 192\]", qn.linear, x[:, :190], w)
    refuses(r"bias is torch.float32 \[41\] .*\[40\]", qn.linear, x, w, torch.randn(41))
    refuses(r"x is torch\.int64", qn.linear, x.long(), w)
    refuses(r"weight is \[192\]", qn.linear, x, qn.quantize(torch.randn(192)))


def test_autocast(device: str) -> None:
    w = qn.quantize(torch.randn(40, 192))
    x = torch.randn(5, 192, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = qn.linear(x, w)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_threads_and_repeats_give_the_same_bytes(request: pytest.FixtureRequest) -> None:
    w = qn.quantize(torch.randn(256, 512))
    threads = torch.get_num_threads()
    for dtype, m in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 3, 64, 200)):
        x = torch.randn(m, 512).to(dtype).requires_grad_()
        grad = torch.randn(m, 256).to(dtype)
        # A device multiplies fp32 by torch, whose product of one row depends on the threads on some CPUs.
        by_torch = dtype is torch.float32 and request.node.callspec.params["device"] == "emulated"

        def run(x: Tensor = x, grad: Tensor = grad) -> tuple[Tensor, ...]:
            y = qn.linear(x, w)
            return y.detach(), *torch.autograd.grad(y, x, grad)

        same_bytes_under_threads(run, (threads, threads, threads if by_torch else 1))


def test_opcheck() -> None:
    for double_quant in (False, True):
        w = qn.quantize(torch.randn(40, 65), double_quant=double_quant)
        x = torch.randn(3, 65, requires_grad=True)
        for b in (None, torch.randn(40, requires_grad=True)):
            torch.library.opcheck(torch.ops.qlora_native.linear_4bit.default, (x, b, *w.op_args()))
        grad = torch.randn(3, 40, requires_grad=True)
        torch.library.opcheck(torch.ops.qlora_native.linear_4bit_grad_input.default, (grad, *w.op_args()))


@pytest.mark.devices("cpu", "cuda")
def test_compiles_without_breaks(backend: str) -> None:
    torch._dynamo.reset()
    layer = qn.nn.QuantizedLinear.from_linear(torch.nn.Linear(64, 32))
    x = torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(lambda t: torch.relu(layer(t)) * 2, fullgraph=True, backend=backend)
    y, want = compiled(x), torch.relu(layer(x)) * 2
    assert relative_error(y, want) < 1e-6
    assert relative_error(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, want))) < 1e-6
