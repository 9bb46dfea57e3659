"""lora_linear_4bit and all its gradients against autograd over plain fp64 torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import GGUF_PRODUCTS, GGUF_TYPES, PRODUCTS, TOLERANCE, Product
from helpers import gguf_weight, relative_error, signed
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import qlora_native as qn
from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
SCALE = 1.75


class Operands:
    def __init__(
        self, case: Product, dtype: torch.dtype, adapter: torch.dtype, *has: str, quant_type: str = "nf4"
    ) -> None:
        """``has``: x_lora, bias or both."""
        m, n, k, r = case
        stored = torch.float32 if dtype == torch.float64 else dtype
        if quant_type == "nf4":
            w = qn.quantize(torch.randn(n, k) / k**0.5)
            self.w = signed(w) if "bias" in has else w
        else:
            self.w = gguf_weight(quant_type, (n, k))
        self.dense = reference.dequantize(stored, *self.w.op_args()).double()
        shapes = {"x": (m, k), "x_lora": (m, k), "a": (r, k), "b": (n, r), "bias": (n,)}
        self.leaves = {
            name: torch.randn(shape, dtype=torch.float64).to(adapter if name in ("a", "b") else dtype).requires_grad_()
            for name, shape in shapes.items()
            if name in ("x", "a", "b", *has)
        }
        self.grad_y = torch.randn(m, n, dtype=torch.float64).to(dtype)

    def ours(self) -> Tensor:
        x, a, b = (self.leaves[name] for name in ("x", "a", "b"))
        return qn.lora_linear(x, self.w, a, b, SCALE, self.leaves.get("bias"), self.leaves.get("x_lora"))

    def usual_norm(self, name: str) -> float:
        """The norm that an adapter's gradient has unless its sums cancel by chance, as one sum of one token may.

        Rounding errors are proportional to the terms of a sum, not to the sum (Higham 2002, section 3.1). Terms of
        random sign add to about their magnitudes' sum over the root of their number.
        """
        magnitude = {key: t.detach().double().abs() for key, t in self.leaves.items()}
        grad_y, x = self.grad_y.double().abs(), magnitude.get("x_lora", magnitude["x"])
        if name == "a":
            return float(SCALE * ((grad_y @ magnitude["b"]).t() @ x).norm()) / max(1, self.grad_y.numel()) ** 0.5
        if name == "b":
            return float(SCALE * (grad_y.t() @ (x @ magnitude["a"].t())).norm()) / max(1, x.numel()) ** 0.5
        return 0.0

    def truth(self) -> tuple[Tensor, dict[str, Tensor]]:
        # The rule: adapters are rounded to x's dtype for their products.
        dtype = self.grad_y.dtype
        wide = {name: t.detach().to(dtype).double().requires_grad_() for name, t in self.leaves.items()}
        adapted = wide.get("x_lora", wide["x"])
        y = wide["x"] @ self.dense.t() + SCALE * (adapted @ wide["a"].t()) @ wide["b"].t()
        if "bias" in wide:
            y = y + wide["bias"]
        y.backward(self.grad_y.double())
        return y.detach(), {name: t.grad for name, t in wide.items()}  # type: ignore[misc]


def check_gradients(operands: Operands, dtype: torch.dtype) -> None:
    y = operands.ours()
    y.backward(operands.grad_y)
    expected, gradients = operands.truth()
    assert y.dtype == dtype
    limit = 2 * TOLERANCE[dtype]  # x A^T is rounded on the way
    assert relative_error(y, expected) < limit
    for name, leaf in operands.leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, name
        truth = gradients[name]
        usual = max(float(truth.norm()), operands.usual_norm(name), 1e-30)
        error = float((leaf.grad.double() - truth).norm()) / usual
        # A gradient is rounded to its leaf's dtype once more.
        assert error < max(limit, TOLERANCE[leaf.dtype]), name


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_forward_and_all_gradients(case: Product, dtype: torch.dtype) -> None:
    adapters = (torch.float32, torch.bfloat16) if dtype != torch.float64 else (torch.float64,)
    for adapter, has in itertools.product(adapters, ((), ("bias",), ("x_lora",), ("x_lora", "bias"))):
        check_gradients(Operands(case, dtype, adapter, *has), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("quant_type", GGUF_TYPES)
def test_gguf_forward_and_all_gradients(quant_type: str, dtype: torch.dtype) -> None:
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    for case, has in itertools.product(GGUF_PRODUCTS, ((), ("x_lora", "bias"))):
        check_gradients(Operands(case, dtype, adapter, *has, quant_type=quant_type), dtype)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [Product(2, 96, 128, 64), Product(40, 96, 128, 64), Product(20, 64, 192, 1536)], ids=str
)
def test_high_ranks(case: Product, dtype: torch.dtype) -> None:
    """An adapter of several panels, and one of more depth than a span holds."""
    check_gradients(Operands(case, dtype, torch.float32, "bias"), dtype)


def test_zero_b_is_the_plain_layer() -> None:
    operands = Operands(Product(5, 48, 96, 4), torch.bfloat16, torch.float32, "bias")
    with torch.no_grad():
        operands.leaves["b"].zero_()
    plain = qn.linear(operands.leaves["x"], operands.w, operands.leaves["bias"])
    assert torch.equal(operands.ours(), plain)


def test_only_the_wanted_gradients() -> None:
    operands = Operands(Product(5, 48, 96, 4), torch.float32, torch.float32, "x_lora", "bias")
    everything = torch.autograd.grad(operands.ours(), list(operands.leaves.values()), operands.grad_y)
    for index, leaf in enumerate(operands.leaves.values()):
        (alone,) = torch.autograd.grad(operands.ours(), leaf, operands.grad_y)
        assert torch.equal(alone, everything[index])


def test_leading_dimensions() -> None:
    w = qn.quantize(torch.randn(40, 64))
    x = torch.randn(2, 3, 64, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(40, 4, requires_grad=True)
    y = qn.lora_linear(x, w, a, b, 2.0)
    y.sum().backward()
    assert y.shape == (2, 3, 40)
    flat = qn.lora_linear(x.reshape(6, 64), w, a, b, 2.0)
    assert relative_error(y.reshape(6, 40), flat) < 1e-6


@pytest.mark.devices("cpu")
def test_compiled_passes_fit_into_cuda_graphs() -> None:
    """What torch.compile(mode="reduce-overhead") captures: forward and backward whole, of ops that a graph can hold."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    operands = Operands(Product(5, 48, 96, 4), torch.bfloat16, torch.float32, "bias")
    leaves = list(operands.leaves.values())
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
