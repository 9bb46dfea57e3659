"""Whose memory the kernels read, as the ops call them: every access looked at, every tensor with its exact bounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import emulated
import emulated_torch
import pytest
import torch
from emulated import Emulator
from emulated_torch import Placed
from test_cuda_emulated import run_decode, run_loss, run_ops_of_optimizers, run_optimizers, run_products

import qlora_native as qn
from qlora_native.ops import _library


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    module = emulated.module_or_skip(request.config, "_cuda_emulated_checked")
    with emulated.kernels(module, monkeypatch) as found:
        yield found


@pytest.fixture
def memory(emulator: Emulator) -> Iterator[Placed]:
    with emulated_torch.placed(emulator) as found:
        yield found


def report_of(emulator: Emulator, call: Callable[[], object]) -> str:
    """What the emulator says of a call that must fail."""
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        call()
    report: str = emulator.module.take_reports()
    return report


@pytest.mark.parametrize(
    "run", [run_decode, run_products, run_loss, run_optimizers, run_ops_of_optimizers], ids=lambda run: run.__name__
)
def test_kernels_stay_within_what_the_ops_give_them(memory: Placed, run: Callable[[], None]) -> None:
    run()


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def loss(w: qn.QuantizedWeight, labels: torch.Tensor) -> object:
    return qn.linear_cross_entropy(bf16(9, 128), w, labels)


def few(w: qn.QuantizedWeight, bias: torch.Tensor) -> object:
    return qn.linear(bf16(3, 128), w, bias)


def many(w: qn.QuantizedWeight, bias: torch.Tensor) -> object:
    return qn.linear(bf16(40, 128), w, bias)


def adapted(w: qn.QuantizedWeight, b: torch.Tensor) -> object:
    return qn.lora_linear(bf16(3, 128), w, bf16(8, 128), b, 2.0)


@pytest.mark.parametrize(
    ("call", "operand", "words"),
    [
        (loss, torch.arange(9), ["72 bytes of memory of", "linear_cross_entropy.cuh"]),
        (few, bf16(64), ["128 bytes of memory of"]),
        (many, bf16(64), ["128 bytes of memory of"]),
        (adapted, bf16(64, 8), ["memory of the host"]),
    ],
)
def test_an_operand_on_the_host(
    emulator: Emulator, memory: Placed, call: Callable[..., object], operand: torch.Tensor, words: list[str]
) -> None:
    w = qn.quantize(torch.randn(64, 128))
    call(w, operand.clone())
    report = report_of(emulator, lambda: call(w, memory.host(operand)))
    assert all(word in report for word in words), report


def test_int32_labels(emulator: Emulator, memory: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an op without the check of its operands: 36 bytes are read as 72."""
    kernel = inspect.unwrap(_library.IMPLEMENTATIONS["linear_cross_entropy", "CUDA"])
    monkeypatch.setitem(_library.IMPLEMENTATIONS, ("linear_cross_entropy", "CUDA"), kernel)
    w = qn.quantize(torch.randn(64, 128))
    loss(w, torch.arange(9))
    report = report_of(emulator, lambda: loss(w, torch.arange(9, dtype=torch.int32)))
    assert "byte 32 of a device allocation" in report
