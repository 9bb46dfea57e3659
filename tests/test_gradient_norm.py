"""gradient_norm against the exact sum, its order, and what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOAT_DTYPES

from qlora_native import reference

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]

OP = torch.ops.qlora_native.gradient_norm
SIZES = (0, 1, 31, 32, 33, 8191, 8192, 8193, 50_000)


def exact(grads: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for grad in grads for x in grad.double().reshape(-1).tolist()))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(dtype, scale) for dtype in FLOAT_DTYPES for scale in (1.0, 1e-30, 1e30) if scale == 1 or dtype != torch.float16],
    ids=str,
)
def test_is_the_norm(dtype: torch.dtype, scale: float) -> None:
    grads = [(torch.randn(n) * scale).to(dtype) for n in SIZES]
    assert float(OP(grads)) == pytest.approx(exact(grads), rel=1e-14, abs=0)
    assert float(reference.gradient_norm(grads)) == pytest.approx(exact(grads), rel=1e-13, abs=0)


def in_32_sums(values: torch.Tensor) -> float:
    """Value i goes to running sum i mod 32; a halving tree adds up the sums."""
    slots = torch.zeros(32, dtype=torch.float64)
    for row in torch.nn.functional.pad(values, (0, -values.numel() % 32)).reshape(-1, 32):
        slots = slots + row
    while len(slots) > 1:
        slots = slots[: len(slots) // 2] + slots[len(slots) // 2 :]
    return float(slots)


def test_order_is_the_one_described() -> None:
    """The squares of a chunk of 8192 in 32 running sums, then the chunks of all tensors likewise: bit by bit."""
    grads = [torch.randn(n) for n in (*SIZES, 400_000)]
    chunks = [chunk for grad in grads for chunk in grad.double().split(8192) if chunk.numel()]
    total = in_32_sums(torch.tensor([in_32_sums(chunk.square()) for chunk in chunks], dtype=torch.float64))
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert float(OP(grads)) == math.sqrt(total)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_wherever_it_stands(dtype: torch.dtype, value: float) -> None:
    for at in (0, 8191, 8192, 49_999):
        grads = [torch.randn(n).to(dtype) for n in SIZES]
        grads[-1][at] = value
        assert not math.isfinite(float(OP(grads)))
    largest = torch.full((100_000,), torch.finfo(dtype).max, dtype=dtype)
    assert math.isfinite(float(OP([largest])))
