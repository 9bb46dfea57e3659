"""dense_linear against fp64: every dtype, few and many rows, its derivatives, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from helpers import errors_in_fp64, relative_error, same_bytes
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
def test_bits_do_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    x, weight, _ = operands((700,), 300, 640, dtype)
    assert same_bytes(dense_linear(x[40:80], weight, None), dense_linear(x, weight, None)[40:80])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("engine", [ANY, CPU], ids=["any", "cpu"])
def test_an_input_gradient_is_scaled_in_the_tensor_given(engine: Engine, dtype: torch.dtype) -> None:
    grad_y, weight, out = (torch.randn(shape).to(dtype) for shape in ((9, 40), (40, 64), (9, 64)))
    assert engine.dense(False, grad_y, weight, scale=0.75, out=out) is out
    assert relative_error(out, grad_y.double() @ weight.double() * 0.75) < TOLERANCE[dtype]
