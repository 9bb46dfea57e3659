"""Whose memory the kernels read, as the ops call them: every access looked at, every tensor with its exact bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import emulated
import emulated_torch
import pytest
import torch
from emulated import Emulator
from emulated_torch import Placed
from test_cuda_emulated import run_decode, run_loss, run_ops_of_optimizers, run_optimizers, run_products

import qlora_native as qn

OPS = torch.ops.qlora_native


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


def test_labels_on_the_host(emulator: Emulator, memory: Placed) -> None:
    h, w = torch.randn(9, 64).bfloat16(), qn.quantize(torch.randn(101, 64))
    qn.linear_cross_entropy(h, w, torch.arange(9))
    labels = memory.host(torch.arange(9))
    report = report_of(emulator, lambda: qn.linear_cross_entropy(h, w, labels))
    assert "72 bytes of memory of" in report and "linear_cross_entropy.cuh" in report


def test_a_bias_on_the_host(emulator: Emulator, memory: Placed) -> None:
    w, bias = qn.quantize(torch.randn(64, 128)), torch.randn(64).bfloat16()
    for m in (3, 40):
        x = torch.randn(m, 128).bfloat16()
        qn.linear(x, w, bias)
        report = report_of(emulator, lambda x=x: qn.linear(x, w, memory.host(bias)))  # type: ignore[misc]
        assert "128 bytes of memory of" in report


def softmax_loss(emulator: Emulator, labels: torch.Tensor) -> None:
    logits, losses = torch.randn(9, 101), torch.empty(9)
    numbers = 0, logits.data_ptr(), labels.data_ptr(), -100, 9, 101, False, losses.data_ptr(), 0
    emulator.module.softmax_loss(*numbers)


def test_int32_labels(emulator: Emulator, memory: Placed) -> None:
    """Below the ops, which may refuse them: 36 bytes are read as 72."""
    softmax_loss(emulator, torch.zeros(9, dtype=torch.int64))
    report = report_of(emulator, lambda: softmax_loss(emulator, torch.zeros(9, dtype=torch.int32)))
    assert "byte 32 of a device allocation" in report


def test_an_adapter_on_the_host(emulator: Emulator, memory: Placed) -> None:
    w, a, b = qn.quantize(torch.randn(64, 128)), torch.randn(8, 128), torch.randn(64, 8)
    x = torch.randn(3, 128).bfloat16()
    wrong = memory.host(b.bfloat16())
    qn.lora_linear(x, w, a.bfloat16(), b.bfloat16(), 2.0)
    assert "memory of the host" in report_of(emulator, lambda: qn.lora_linear(x, w, a.bfloat16(), wrong, 2.0))
