"""lora_linear_4bit and all its gradients against autograd over plain fp64 torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import GGUF_PRODUCTS, GGUF_TYPES, PRODUCTS, TOLERANCE, Product
from helpers import SavedTensors, gguf_weight, refuses, relative_error, signed
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import qlora_native as qn
from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
SCALE = 1.75


class Operands:
    def __init__(
        self,
        case: Product,
        dtype: torch.dtype,
        adapter: torch.dtype,
        separate: bool,
        bias: bool,
        quant_type: str = "nf4",
    ) -> None:
        stored = torch.float32 if dtype == torch.float64 else dtype
        if quant_type == "nf4":
            w = qn.quantize(torch.randn(case.n, case.k) / case.k**0.5)
            self.w = signed(w) if bias else w
        else:
            self.w = gguf_weight(quant_type, (case.n, case.k))
        self.dense = reference.dequantize(stored, *self.w.op_args()).double()

        def leaf(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(to).requires_grad_()

        self.x = leaf(case.m, case.k)
        self.x_lora = leaf(case.m, case.k) if separate else None
        self.a = leaf(case.r, case.k, to=adapter)
        self.b = leaf(case.n, case.r, to=adapter)
        self.bias = leaf(case.n) if bias else None
        self.grad_y = torch.randn(case.m, case.n, dtype=torch.float64).to(dtype)

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "x_lora": self.x_lora, "a": self.a, "b": self.b, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None}

    def ours(self) -> Tensor:
        return qn.lora_linear(self.x, self.w, self.a, self.b, SCALE, self.bias, self.x_lora)

    def usual_norm(self, name: str) -> float:
        """The norm that an adapter's gradient has unless its sums cancel by chance, as one sum of one token may.

        Rounding errors are proportional to the terms of a sum, not to the sum (Higham 2002, section 3.1). Terms of
        random sign add to about their magnitudes' sum over the root of their number.
        """
        magnitude = {key: t.detach().double().abs() for key, t in self.leaves().items()}
        grad_y, x = self.grad_y.double().abs(), magnitude.get("x_lora", magnitude["x"])
        if name == "a":
            return float(SCALE * ((grad_y @ magnitude["b"]).t() @ x).norm()) / max(1, self.grad_y.numel()) ** 0.5
        if name == "b":
            return float(SCALE * (grad_y.t() @ (x @ magnitude["a"].t())).norm()) / max(1, x.numel()) ** 0.5
        return 0.0

    def truth(self) -> tuple[Tensor, dict[str, Tensor]]:
        # The rule: adapters are rounded to x's dtype for their products.
        wide = {name: t.detach().to(self.x.dtype).double().requires_grad_() for name, t in self.leaves().items()}
        adapted = wide.get("x_lora", wide["x"])
        y = wide["x"] @ self.dense.t() + SCALE * (adapted @ wide["a"].t()) @ wide["b"].t()
        if "bias" in wide:
            y = y + wide["bias"]
        y.backward(self.grad_y.double())
        return y.detach(), {name: t.grad for name, t in wide.items()}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_forward_and_all_gradients(case: Product, dtype: torch.dtype) -> None:
    adapters = (torch.float32, torch.bfloat16) if dtype != torch.float64 else (torch.float64,)
    for adapter, separate, bias in itertools.product(adapters, (False, True), (False, True)):
        check_gradients(Operands(case, dtype, adapter, separate, bias), dtype)


@pytest.mark.devices("cpu", "cuda", "emulated")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_forward_and_all_gradients(quant_type: str, dtype: torch.dtype) -> None:
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    for case, separate in itertools.product(GGUF_PRODUCTS, (False, True)):
        check_gradients(Operands(case, dtype, adapter, separate, separate, quant_type), dtype)


def check_gradients(operands: Operands, dtype: torch.dtype) -> None:
    y = operands.ours()
    y.backward(operands.grad_y)
    expected, gradients = operands.truth()
    assert y.dtype == dtype
    limit = 2 * TOLERANCE[dtype]  # x A^T is rounded on the way
    assert relative_error(y, expected) < limit
    for name, leaf in operands.leaves().items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, name
        truth = gradients[name]
        usual = max(float(truth.norm()), operands.usual_norm(name), 1e-30)
        error = float((leaf.grad.double() - truth).norm()) / usual
        # A gradient is rounded to its leaf's dtype once more.
        assert error < max(limit, TOLERANCE[leaf.dtype]), name


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [Product(2, 96, 128, 64), Product(40, 96, 128, 64), Product(20, 64, 192, 1536)], ids=str
)
def test_high_ranks(case: Product, dtype: torch.dtype) -> None:
    """An adapter of several panels, and one of more depth than a span holds."""
    operands = Operands(case, dtype, torch.float32, False, True)
    y = operands.ours()
    y.backward(operands.grad_y)
    expected, gradients = operands.truth()
    assert relative_error(y, expected) < 2 * TOLERANCE[dtype]
    for name, leaf in operands.leaves().items():
        assert relative_error(leaf.grad, gradients[name]) < 2 * TOLERANCE[dtype], name


def test_zero_b_is_the_plain_layer() -> None:
    operands = Operands(Product(5, 48, 96, 4), torch.bfloat16, torch.float32, False, True)
    with torch.no_grad():
        operands.b.zero_()
    assert torch.equal(operands.ours(), qn.linear(operands.x, operands.w, operands.bias))


def test_only_the_wanted_gradients() -> None:
    operands = Operands(Product(5, 48, 96, 4), torch.float32, torch.float32, True, True)
    everything = torch.autograd.grad(operands.ours(), list(operands.leaves().values()), operands.grad_y)
    for index, leaf in enumerate(operands.leaves().values()):
        (alone,) = torch.autograd.grad(operands.ours(), leaf, operands.grad_y)
        assert torch.equal(alone, everything[index])


def test_gradcheck_twice() -> None:
    w = qn.quantize(torch.randn(6, 8), block_size=32)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 8), (2, 8), (6, 2), (6,), (3, 8))]

    def function(x: Tensor, a: Tensor, b: Tensor, bias: Tensor, xl: Tensor) -> Tensor:
        return qn.lora_linear(x, w, a, b, 0.5, bias, xl) + qn.lora_linear(x, w, a, b, 0.5)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_what_is_saved() -> None:
    """x, x A^T, the adapters and the packed weight: nothing of the size of W or y."""
    operands = Operands(Product(16, 256, 128, 4), torch.float32, torch.float32, False, False)
    with SavedTensors() as saved:
        operands.ours()
    floats = sorted(tuple(t.shape) for t in saved.tensors if t.is_floating_point() and t.dim() == 2)
    assert floats == sorted([(16, 128), (4, 128), (256, 4), (16, 4)])


def test_leading_dimensions() -> None:
    w = qn.quantize(torch.randn(40, 64))
    x = torch.randn(2, 3, 64, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    y = qn.lora_linear(x, w, a, b, 2.0)
    y.sum().backward()
    assert y.shape == (2, 3, 40)
    flat = qn.lora_linear(x.reshape(6, 64), w, a, b, 2.0)
    assert relative_error(y.reshape(6, 40), flat) < 1e-6


def test_refuses_in_words() -> None:
    w = qn.quantize(torch.randn(40, 64))
    for a, b, x_lora, message in (
        ((4, 65), (40, 4), (2, 64), r"a is torch\.float32 \[4, 65\] .*\[4, 64\]"),
        ((4, 64), (40, 5), (2, 64), r"b is torch\.float32 \[40, 5\] .*\[40, 4\]"),
        ((4, 64), (40, 4), (3, 64), r"x_lora is torch\.float32 \[3, 64\]"),
    ):
        operands = torch.randn(2, 64), w, torch.randn(a), torch.randn(b)
        refuses(message, qn.lora_linear, *operands, 1.0, x_lora=torch.randn(x_lora))


def test_autocast(device: str) -> None:
    operands = Operands(Product(5, 48, 96, 4), torch.float32, torch.float32, False, False)
    with torch.autocast(device, torch.bfloat16):
        y = operands.ours()
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert operands.a.grad is not None and operands.a.grad.dtype == torch.float32


def test_opcheck() -> None:
    operands = Operands(Product(3, 40, 65, 4), torch.float32, torch.float32, True, True)
    for x_lora, bias in ((None, None), (operands.x_lora, operands.bias)):
        torch.library.opcheck(
            torch.ops.qlora_native.lora_linear_4bit.default,
            (operands.x, x_lora, operands.a, operands.b, SCALE, bias, *operands.w.op_args()),
        )


@pytest.mark.devices("cpu", "cuda")
def test_compiles_without_breaks(backend: str) -> None:
    torch._dynamo.reset()
    operands = Operands(Product(5, 48, 96, 4), torch.float32, torch.float32, False, True)
    leaves = list(operands.leaves().values())
    expected = torch.autograd.grad(torch.relu(operands.ours()), leaves, operands.grad_y)
    compiled = torch.compile(lambda: torch.relu(operands.ours()), fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(), leaves, operands.grad_y)
    assert max(map(relative_error, got, expected)) < 1e-6


@pytest.mark.devices("cpu")
def test_compiled_passes_fit_into_cuda_graphs() -> None:
    """What torch.compile(mode="reduce-overhead") captures: forward and backward whole, of ops that a graph can hold."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    operands = Operands(Product(5, 48, 96, 4), torch.bfloat16, torch.float32, False, True)
    leaves = list(operands.leaves().values())
    compiled = torch.compile(
        lambda: torch.relu(operands.ours()), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    got = torch.autograd.grad(compiled(), leaves, operands.grad_y)
    expected = torch.autograd.grad(torch.relu(operands.ours()), leaves, operands.grad_y)
    assert max(map(relative_error, got, expected)) < TOLERANCE[torch.bfloat16]
    called = [[node.target for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    assert [any("lora_linear_4bit" in str(target) for target in targets) for targets in called] == [True, True]
    for target in itertools.chain(*called):
        assert torch.Tag.cudagraph_unsafe not in getattr(target, "tags", ()), target
    assert torch.Tag.cudagraph_unsafe in torch.ops.qlora_native.quantize_4bit.default.tags
