"""gptq_4bit: byte for byte the plain-torch truth, and the codes of GPTQ as it was published."""

from __future__ import annotations

import pytest
import torch
from cases import FLOAT_DTYPES, QUANT_TYPES
from helpers import refuses, same_bytes
from torch import Tensor

import qlora_native as qn
from qlora_native import reference
from qlora_native.calibration.quantize import feedback_factor

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda"), pytest.mark.usefixtures("device")]

Case = tuple[Tensor, Tensor, Tensor, Tensor, int, int]


def arguments(shape: tuple[int, int], dtype: torch.dtype = torch.float32, quant_type: int = 0) -> Case:
    """Of the op, with scales of both signs and one that is zero."""
    t = torch.randn(shape).to(dtype)
    blocks = -(-t.numel() // 64)
    scales = torch.randn(blocks) * 2
    scales[blocks // 2] = 0
    k = shape[1]
    return t, torch.randn(k, k) * 0.1, torch.randperm(k), scales, quant_type, 64


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_matches_the_reference(quant_type: str, dtype: torch.dtype) -> None:
    for shape in ((5, 77), (1, 1), (33, 96), (70, 192)):
        case = arguments(shape, dtype, QUANT_TYPES.index(quant_type))
        assert same_bytes(torch.ops.qlora_native.gptq_4bit(*case), reference.gptq(*case))


def published(weight: Tensor, hessian: Tensor, scales: Tensor) -> Tensor:
    """Algorithm 1 of the GPTQ paper in double precision: the Cholesky factor of the damped inverse. Decoded [N, K]."""
    levels = qn._native.levels(0).double().to(weight.device)
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    damped = hessian.double() + 0.01 * torch.diagonal(hessian).double().mean() * torch.eye(hessian.shape[0])
    inverse = torch.linalg.inv(damped[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest = weight.double()[:, order]
    spread = scales.double().repeat_interleave(64).reshape(weight.shape)[:, order]
    decoded = torch.empty_like(rest)
    for i in range(rest.shape[1]):
        nearest = (rest[:, i : i + 1] / spread[:, i : i + 1] - levels).abs().argmin(1)
        decoded[:, i] = levels[nearest] * spread[:, i]
        error = (rest[:, i] - decoded[:, i]) / upper[i, i]
        rest[:, i:] -= error[:, None] * upper[i, i:]
    back = torch.empty_like(decoded)
    back[:, order] = decoded
    return back


def test_is_gptq_as_published() -> None:
    n, k = 48, 128
    x = torch.randn(512, k) @ (torch.eye(k) + 0.1 * torch.randn(k, k)) * torch.randn(k).exp()
    hessian = x.t() @ x
    weight = torch.randn(n, k)
    plain = qn.quantize(weight, double_quant=False)
    found = feedback_factor(hessian, 0.01)
    assert found is not None
    factor, order, damping = found
    assert damping == 0.01
    plain.packed = torch.ops.qlora_native.gptq_4bit(weight, factor, order, plain.absmax, 0, 64)
    # Rounding may turn a code that lies on a boundary, and then the rest of its row.
    same = (plain.dequantize().double() - published(weight, hessian, plain.absmax)).abs() < 1e-5
    assert float(same.all(1).double().mean()) > 0.9


def test_empty_and_no_permutation() -> None:
    t, factor, order, *rest = arguments((8, 96))
    gptq = torch.ops.qlora_native.gptq_4bit
    assert gptq(t[:0], factor, order, torch.zeros(0), 0, 64).numel() == 0
    if t.device.type == "cpu":
        refuses("no permutation", gptq, t, factor, torch.zeros_like(order), *rest)
