"""rms_norm against fp64, LlamaRMSNorm's rounding, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import SavedTensors, errors_in_fp64, refuses, relative_error, same_bytes_under_threads, same_values
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
def test_forward_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = operands(shape, dtype)
    rstd = rms_norm(x, weight, EPS)[1]
    assert rstd.dtype == torch.float32
    assert relative_error(rstd, reference.rms_norm(x.double(), weight.double(), EPS)[1]) < 2e-7
    output, gradient = errors_in_fp64(
        lambda t: rms_norm(t, weight, EPS)[0], lambda t: reference.rms_norm(t, weight.double(), EPS)[0], x
    )
    assert output < TOLERANCE[dtype]
    # Of one element, the gradient is a difference of nearly equal numbers.
    assert gradient < TOLERANCE[dtype] or shape[-1] == 1


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


def test_weight_gradient() -> None:
    errors = errors_in_fp64(
        lambda x, w: rms_norm(x, w, EPS)[0],
        lambda x, w: reference.rms_norm(x, w, EPS)[0],
        *operands((6, 33), torch.float32),
    )
    assert max(errors) < 1e-6


def test_keeps_its_input_and_one_number_a_row() -> None:
    x, weight = operands((8, 64), torch.bfloat16)
    x.requires_grad_()
    with SavedTensors() as saved:
        rms_norm(x, weight, EPS)
    assert sum(t.numel() * t.element_size() for t in saved.tensors if t.data_ptr() != x.data_ptr()) == 8 * 4 + 64 * 2


def test_strides_do_not_matter() -> None:
    x, weight = operands((40, 12), torch.float32)
    strided, spread = x.t().contiguous().t(), torch.empty(24)[::2].copy_(weight)
    assert same_values(rms_norm(strided, spread, EPS)[0], rms_norm(x, weight, EPS)[0])


@pytest.mark.devices("cpu")
def test_threads_do_not_matter() -> None:
    x, weight = operands((301, 576), torch.bfloat16)
    same_bytes_under_threads(lambda: rms_norm(x, weight, EPS))


def test_gradcheck_twice() -> None:
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, w: rms_norm(t, w, EPS)[0], (x, weight))
    assert torch.autograd.gradgradcheck(lambda t: rms_norm(t, weight.detach(), EPS)[0], (x,))


def test_refuses_in_words() -> None:
    refuses(r"weight is torch.float32 \[5\] .*\[4\]", rms_norm, torch.randn(2, 4), torch.randn(5), EPS)
    refuses(
        "weight is torch.float32 .*: expected torch.bfloat16",
        rms_norm,
        torch.randn(2, 4).bfloat16(),
        torch.randn(4),
        EPS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = operands((3, 20), dtype)
    torch.library.opcheck(torch.ops.qlora_native.rms_norm.default, (x.requires_grad_(), weight, EPS))
    _, rstd = rms_norm(x.detach(), weight, EPS)
    backward = torch.ops.qlora_native.rms_norm_backward.default
    torch.library.opcheck(backward, (torch.randn_like(x), x.detach(), weight, rstd, EPS))
