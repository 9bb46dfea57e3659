"""lion_step against the paper in double precision, and its bytes against the plain-torch rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error, same_bytes

import qlora_native as qn
from qlora_native import reference
from qlora_native.cases import FLOAT_DTYPES

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]

OP = torch.ops.qlora_native.lion_step
SIZES = (0, 1, 15, 17, 255, 256, 257, 5001, 40_000)
OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def lists(sizes: tuple[int, ...], dtype: torch.dtype, coded: bool) -> list[list[torch.Tensor]]:
    """params, grads, exp_avgs, absmaxes."""
    return [
        [torch.randn(n).to(dtype) for n in sizes],
        [torch.randn(n).to(dtype) for n in sizes],
        [torch.zeros(n, dtype=torch.int8 if coded else torch.float32) for n in sizes],
        [torch.zeros(-(-n // 256)) for n in sizes] if coded else [],
    ]


def clone(parts: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[t.clone() for t in part] for part in parts]


def call(parts: list[list[torch.Tensor]], factor: float = 1.0) -> None:
    OP(*parts, *OPTIONS.values(), factor)


def by_reference(parts: list[list[torch.Tensor]], factor: float = 1.0) -> None:
    params, grads, exp_avgs, absmaxes = parts
    for i, param in enumerate(params):
        absmax = absmaxes[i] if absmaxes else None
        reference.lion_step(param, grads[i], exp_avgs[i], absmax, grad_factor=factor, **OPTIONS)


def same(a: Any, b: Any) -> bool:
    return all(same_bytes(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def test_is_the_paper() -> None:
    """Algorithm 2 of Chen et al. 2023, in double precision. A sign that hangs on the last bit may differ."""
    parts = lists((5000,), torch.float32, False)
    w, m = parts[0][0].double(), torch.zeros(5000, dtype=torch.float64)
    lr, beta1, beta2, decay = OPTIONS.values()
    for _ in range(20):
        parts[1] = [torch.randn(5000)]
        g = parts[1][0].double()
        update = torch.sign(beta1 * m + (1 - beta1) * g)
        w = w - lr * (update + decay * w)
        m = beta2 * m + (1 - beta2) * g
        call(parts)
    assert ((parts[0][0] - w).abs() > 1e-5).sum() <= 2
    assert relative_error(parts[2][0], m) < 1e-6


@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bytes_are_those_of_the_rule(dtype: torch.dtype, coded: bool) -> None:
    parts = lists(SIZES, dtype, coded)
    parts[1][-1][::3] = 0  # a sign of 0 moves nothing but the decay
    expected = clone(parts)
    for factor in (1.0, 0.37, 1e-4):
        call(parts, factor)
        by_reference(expected, factor)
        assert same(parts, expected)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
def test_thread_count_does_not_change_bytes(coded: bool) -> None:
    start = lists((100, 70_000, 3, 40_001), torch.float32, coded)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        parts = clone(start)
        call(parts)
        call(parts)
        results.append(parts)
    torch.set_num_threads(threads)
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_non_contiguous() -> None:
    parts = lists((2400,), torch.float32, False)
    parts = [[t.reshape(40, 60) for t in part] for part in parts]
    expected = clone(parts)
    parts[0] = [torch.empty(60, 40).t().copy_(parts[0][0])]
    call(parts)
    call(expected)
    assert same(parts, expected)


def test_gradients_of_another_dtype() -> None:
    parts = lists((300,), torch.bfloat16, False)
    parts[1] = [torch.randn(300)]
    expected = clone(parts)
    call(parts)
    by_reference(expected)
    assert same(parts, expected)


@pytest.mark.parametrize("coded", [False, True], ids=["32-bit", "8-bit"])
def test_opcheck(coded: bool) -> None:
    torch.library.opcheck(OP.default, (*lists((300, 5), torch.float32, coded), *OPTIONS.values(), 1.0))


def test_refuses_in_words() -> None:
    parts = lists((300,), torch.float32, False)
    parts[2] = [torch.zeros(300, dtype=torch.int8)]
    with pytest.raises(ValueError, match=r"lion_step: exp_avg 0 is torch.int8 \[300\] on \w+(:0)?: expected .*float32"):
        call(parts)
    with pytest.raises(ValueError, match="1 parameters, but 0 gradients"):
        OP(parts[0], [], parts[2], [], *OPTIONS.values(), 1.0)


def test_the_path_of_other_devices() -> None:
    parts = lists((300, 5), torch.float32, True)
    expected = clone(parts)
    qn.ops.lion_step.anywhere(*parts, *OPTIONS.values(), 0.5)
    call(expected, 0.5)
    assert same(parts, expected)
