"""dense_linear against fp64: every dtype, few and many rows, its derivatives, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from helpers import SavedTensors, errors_in_fp64, refuses, relative_error, same_bytes, same_bytes_under_threads
from torch import Tensor

from qlora_native.ops._engine import ANY, Engine
from qlora_native.ops.linear_4bit import CPU

pytestmark = [pytest.mark.isa, pytest.mark.usefixtures("device")]
dense_linear = torch.ops.qlora_native.dense_linear
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = ((1,), (2, 1), (8,), (9,), (3, 50), (0,), (600,))


def operands(shape: tuple[int, ...], n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*shape, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "k"), [(70, 96), (1, 33), (257, 31), (64, 1025)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape: tuple[int, ...], n: int, k: int, dtype: torch.dtype) -> None:
    errors = errors_in_fp64(dense_linear, torch.nn.functional.linear, *operands(shape, n, k, dtype))
    assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_depend_neither_on_threads_nor_on_other_rows(dtype: torch.dtype) -> None:
    x, weight, _ = operands((700,), 300, 640, dtype)
    grad_y = torch.randn(700, 300).to(dtype)
    grad_input = torch.ops.qlora_native.dense_linear_grad_input
    grad_weight = torch.ops.qlora_native.dense_linear_grad_weight
    y, *_ = same_bytes_under_threads(
        lambda: (dense_linear(x, weight, None), grad_input(grad_y, weight), grad_weight(grad_y, x)), (1, 2, 3)
    )
    assert same_bytes(dense_linear(x[40:80], weight, None), y[40:80])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("engine", [ANY, CPU], ids=["any", "cpu"])
def test_an_input_gradient_is_scaled_in_the_tensor_given(engine: Engine, dtype: torch.dtype) -> None:
    grad_y, weight, out = (torch.randn(shape).to(dtype) for shape in ((9, 40), (40, 64), (9, 64)))
    assert engine.dense(False, grad_y, weight, scale=0.75, out=out) is out
    assert relative_error(out, grad_y.double() @ weight.double() * 0.75) < TOLERANCE[dtype]


def test_a_frozen_weight_keeps_no_input() -> None:
    x, weight, _ = operands((9,), 40, 64, torch.bfloat16)
    x.requires_grad_()
    with SavedTensors() as saved:
        dense_linear(x, weight, None)
    assert {t.data_ptr() for t in saved.tensors} == {weight.data_ptr()}


def test_strides_do_not_matter() -> None:
    x, weight, bias = operands((20,), 40, 64, torch.bfloat16)
    expected = dense_linear(x, weight, bias)
    assert same_bytes(dense_linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias), expected)


def test_gradcheck_twice() -> None:
    tensors = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5), (4,)))
    assert torch.autograd.gradcheck(dense_linear, tensors)
    assert torch.autograd.gradgradcheck(dense_linear, tensors)


def test_opcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in operands((12,), 20, 32, torch.bfloat16))
    torch.library.opcheck(dense_linear, (x, weight, bias))
    torch.library.opcheck(torch.ops.qlora_native.dense_linear_grad_input, (torch.randn(12, 20).bfloat16(), weight))


def test_refuses_in_words() -> None:
    x, weight, bias = operands((2,), 4, 8, torch.bfloat16)
    refuses(
        r"weight is torch.bfloat16 \[4, 8\] .*expected torch.bfloat16 \[4, 7\]", dense_linear, x[:, :7], weight, bias
    )
    refuses("weight is torch.bfloat16 .*: expected torch.float32", dense_linear, x.float(), weight, bias)
    refuses(r"bias is torch.bfloat16 \[3\] .*\[4\]", dense_linear, x, weight, bias[:3])
