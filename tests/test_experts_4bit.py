"""experts_4bit: the bits of single products, and all gradients against autograd over plain fp64 torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cases import FLOAT_DTYPES, TOLERANCE
from helpers import SavedTensors, gguf_weight, relative_error, same_bytes, same_bytes_under_threads
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.ops.experts_4bit import experts_4bit

pytestmark = pytest.mark.isa
SCALE = 1.75


class Case(NamedTuple):
    """Rows of each expert, and rows of none behind them; N, K and the rank."""

    sizes: tuple[int, ...]
    n: int
    k: int
    r: int
    behind: int = 0
    quant_type: str = "nf4"
    double_quant: bool = True


CASES = {
    "one expert": Case((9,), 48, 64, 4),
    "one token": Case((0, 1, 0), 96, 128, 3),
    "no token": Case((0, 0), 64, 64, 2),
    # Scales of scales begin anew with an expert, or in its midst; rows go by few, by many, by more than a unit.
    "aligned": Case((7, 0, 530, 2, 40), 128, 128, 8),
    "in the midst": Case((3, 20, 0, 5), 80, 192, 8),
    "plain scales": Case((3, 20, 0, 5), 80, 192, 8, double_quant=False),
    "wide": Case((30, 1, 12), 1100, 64, 16),
    "odd": Case((6, 3, 17), 64, 65, 5, quant_type="fp4"),
    "rows of none": Case((4, 0, 11), 64, 128, 4, behind=5),
    "gguf": Case((2, 33, 0), 96, 256, 4, quant_type="q4_k"),
    "no adapter": Case((4, 0, 70, 1), 112, 192, 0),
}


class Stack:
    """Operands of a case: x [T, K] and token [S], or the rows themselves."""

    def __init__(self, case: Case, dtype: torch.dtype, has_token: bool = True, adapter: torch.dtype = torch.float32):
        sizes, n, k, r, behind, quant_type, double_quant = case
        self.case, self.experts, rows = case, len(sizes), sum(sizes) + behind
        shape = (self.experts, n, k)
        if quant_type in ("nf4", "fp4"):
            dense = torch.randn(shape) / k**0.5
            self.w = qn.quantize(dense, quant_type=quant_type, double_quant=double_quant)
        else:
            self.w = gguf_weight(quant_type, shape)
        self.offsets = torch.tensor([0, *sizes]).cumsum(0)
        tokens = rows // 2 + 1  # so that some have several rows
        self.token = torch.randint(tokens, (rows,)) if has_token else None
        of = {"x": (tokens if has_token else rows, k), "a": (self.experts, r, k), "b": (self.experts, n, r)}
        kinds = {"x": dtype, "a": adapter, "b": adapter}
        self.leaves = {name: torch.randn(of[name]).to(kinds[name]).requires_grad_() for name in of}
        if not r:
            self.leaves = {"x": self.leaves["x"]}
        self.grad_y = torch.randn(rows, n).to(dtype)

    def y(self) -> Tensor:
        x, *factors = self.leaves.values()
        adapter: Any = (*factors, SCALE) if factors else ()
        return experts_4bit(x, self.token, self.offsets, self.w.op_args(), *adapter)

    def gradients(self) -> dict[str, Tensor]:
        found = torch.autograd.grad(self.y(), list(self.leaves.values()), self.grad_y)
        return dict(zip(self.leaves, found, strict=True))

    def single(self) -> dict[str, Tensor]:
        """y and the gradients, those of x by rows, by a product for each expert."""
        x = self.leaves["x"].detach() if self.token is None else self.leaves["x"].detach()[self.token]
        behind = slice(int(self.offsets[-1]), None)
        parts: dict[str, list[Tensor]] = {name: [] for name in ("y", *self.leaves)}
        for expert, (first, last) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            rows = {"x": x[first:last], **{name: t[expert] for name, t in self.leaves.items() if name != "x"}}
            leaves = {name: t.detach().clone().requires_grad_() for name, t in rows.items()}
            own = leaves["x"], self.w[expert]
            factors = list(leaves.values())[1:]
            y = qn.lora_linear(*own, factors[0], factors[1], SCALE) if factors else qn.linear(*own)
            found = y, *torch.autograd.grad(y, list(leaves.values()), self.grad_y[first:last])
            for name, value in zip(parts, found, strict=True):
                parts[name].append(value)
        stacked = {name: torch.stack(parts[name]) for name in parts if name in ("a", "b")}
        y, grad_x = (torch.cat([*parts[name], torch.zeros_like(t[behind])])
                     for name, t in (("y", self.grad_y), ("x", x)))  # fmt: skip
        return {"y": y, "x": grad_x, **stacked}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_bits_of_single_products(case: Case, dtype: torch.dtype) -> None:
    for has_token, adapter in ((True, torch.float32), (False, torch.bfloat16)):
        stack = Stack(case, dtype, has_token, adapter)
        got, expected = {"y": stack.y().detach(), **stack.gradients()}, stack.single()
        if stack.token is not None:  # added in their order, in fp32
            wide = torch.zeros(stack.leaves["x"].shape)
            for row, token in zip(expected["x"], stack.token, strict=True):
                wide[token] += row
            expected["x"] = wide.to(dtype)
        for name, value in expected.items():
            assert same_bytes(got[name], value), (name, has_token)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_autograd_over_dense_weights(case: Case, dtype: torch.dtype) -> None:
    stack = Stack(case, dtype, adapter=torch.float64 if dtype == torch.float64 else torch.float32)
    dense = reference.dequantize(torch.float32 if dtype == torch.float64 else dtype, *stack.w.op_args()).double()
    wide = {name: t.detach().to(dtype).double().requires_grad_() for name, t in stack.leaves.items()}
    if "a" in wide:
        dense = dense + SCALE * wide["b"] @ wide["a"]
    x = wide["x"][stack.token]
    parts = x[: stack.offsets[-1]].split(list(case.sizes))
    y = torch.cat([*(rows @ w.t() for rows, w in zip(parts, dense, strict=True)), x.new_zeros(case.behind, case.n)])
    gradients = torch.autograd.grad(y, list(wide.values()), stack.grad_y.double())
    limit = 3 * TOLERANCE[dtype]  # x A^T is rounded on the way, and rows before they are added
    assert relative_error(stack.y(), y) < limit
    for (name, got), truth in zip(stack.gradients().items(), gradients, strict=True):
        assert got.dtype == stack.leaves[name].dtype
        assert relative_error(got, truth) < limit, name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["aligned", "in the midst", "wide", "no adapter"])
def test_threads_change_no_byte(name: str, dtype: torch.dtype) -> None:
    stack = Stack(CASES[name], dtype)
    same_bytes_under_threads(lambda: [stack.y().detach(), *stack.gradients().values()], (1, 2, 3))


def test_without_an_adapter_no_x_is_kept() -> None:
    stack = Stack(CASES["no adapter"], torch.bfloat16)
    with SavedTensors() as saved:
        stack.y()
    assert not any(t.numel() for t in saved.tensors if t.is_floating_point() and t.dtype == torch.bfloat16)
    assert all(t.numel() <= stack.w.packed.numel() for t in saved.tensors)


WRONG: dict[str, Any] = {
    "falling": [0, 9, 4, 15],
    "from one": [1, 4, 9, 15],
    "beyond the rows": [0, 4, 9, 16],
    "too few": [0, 4, 15],
    "too many": [0, 4, 9, 12, 15],
    "none": [],
}


@pytest.mark.parametrize("offsets", WRONG.values(), ids=WRONG)
def test_offsets_that_do_not_fit(offsets: list[int]) -> None:
    stack = Stack(Case((4, 5, 6), 48, 64, 2), torch.float32)
    stack.offsets = torch.tensor(offsets, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"offsets|weight"):
        stack.y()
