"""rms_norm against fp64, LlamaRMSNorm's rounding, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import errors_in_fp64, relative_error
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
rms_norm = torch.ops.qlora_native.rms_norm
EPS = 1e-5
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = ((1, 1), (3, 16), (2, 5, 17), (4, 576), (1, 3, 100), (0, 8), (7, 2049))


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = operands(shape, dtype)
    rstd = rms_norm(x, weight, EPS)[1]
    assert rstd.dtype == torch.float32
    assert relative_error(rstd, reference.rms_norm(x.double(), weight.double(), EPS)[1]) < 2e-7
    output, of_x, of_weight = errors_in_fp64(
        lambda x, w: rms_norm(x, w, EPS)[0], lambda x, w: reference.rms_norm(x, w, EPS)[0], x, weight
    )
    assert output < TOLERANCE[dtype]
    # Of one element, the gradient is a difference of nearly equal numbers.
    assert of_x < TOLERANCE[dtype] or shape[-1] == 1
    assert of_weight < max(TOLERANCE[dtype], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_llama_does(dtype: torch.dtype) -> None:
    """All but the elements that the order of the sum pushes over a rounding boundary are the same bits."""
    x, weight = operands((64, 576), dtype)
    norm = LlamaRMSNorm(576, EPS).to(dtype)
    norm.weight.data.copy_(weight)
    assert (rms_norm(x, weight, EPS)[0] != norm(x)).float().mean() < 1e-3


def test_small_rows_feel_eps_and_zero_rows_stay_zero() -> None:
    x = torch.tensor([[1e-4, -1e-4], [0.0, 0.0]])
    y, rstd = rms_norm(x, torch.ones(2), EPS)
    assert relative_error(y, x.double() / (1e-8 + EPS) ** 0.5) < 1e-6
    assert (y[1] == 0).all() and rstd[1] == pytest.approx(EPS**-0.5)


def test_non_finite_rows_do_not_spread() -> None:
    x = torch.randn(3, 32)
    x[1, 5] = torch.nan
    y, _ = rms_norm(x, torch.ones(32), EPS)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
