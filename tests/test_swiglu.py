"""swiglu against fp64, torch's rounding, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import errors_in_fp64, same_values
from torch import Tensor

from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]
swiglu = torch.ops.qlora_native.swiglu
TOLERANCE = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = ((1,), (16,), (3, 17), (2, 5, 100), (0, 4), (64, 1536))


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert max(errors_in_fp64(swiglu, reference.swiglu, *operands(shape, dtype))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_torch_does(dtype: torch.dtype) -> None:
    gate, up = operands((64, 1536), dtype)
    assert (swiglu(gate, up) != torch.nn.functional.silu(gate) * up).float().mean() < 1e-3


def test_the_exponential_over_its_whole_range() -> None:
    """Relative error below 2.5e-7 wherever the result is a normal number, no overflow anywhere, NaN kept."""
    gate = torch.linspace(-87.0, 200.0, 1_000_003)
    truth = torch.nn.functional.silu(gate.double())
    error = (swiglu(gate, torch.ones_like(gate)).double() - truth).abs() / truth.abs().clamp_min(1e-36)
    assert float(error.max()) < 2.5e-7
    edges = torch.tensor([-torch.inf, -1e30, -1e4, -120.0, -88.0, 0.0, 120.0, 1e30, torch.inf, torch.nan])
    got = swiglu(edges, torch.ones(10))
    assert (got[1:5].abs() < 1e-35).all() and got[5] == 0
    assert same_values(got[6:], edges[6:])
