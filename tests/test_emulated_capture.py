"""Captures of ops and of torch's own operations over the emulator, and their replays."""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import pytest
import torch
from emulated import Emulator
from emulated_torch import captured
from helpers import same_bytes
from torch import Tensor

import qlora_native as qn

OPS = torch.ops.qlora_native


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    with emulated.kernels(emulated.module_or_skip(request.config), monkeypatch) as found:
        yield found


def states() -> list[Tensor]:
    """Of one parameter: it, its gradient, both moments and the step."""
    torch.manual_seed(0)
    return [torch.randn(9000), torch.randn(9000), torch.zeros(9000), torch.zeros(9000), torch.zeros(())]


def adamw_step(tensors: list[Tensor], lr: float) -> None:
    lists = [[tensor] for tensor in tensors]
    OPS.adamw_step(*lists[:4], [], [], lists[4], lr, 0.9, 0.99, 1e-8, 0.0, True, 1.0)


def test_a_captured_step_keeps_its_learning_rate(emulator: Emulator) -> None:
    there, here = states(), states()
    lr = 0.1
    with captured(emulator) as graph:
        adamw_step(there, lr)
    assert same_bytes(there[0], here[0]), "nothing has run"
    lr = 7.0  # too late: the graph holds what it was
    for _ in range(3):
        graph.replay()
        adamw_step(here, 0.1)
    assert all(same_bytes(one, other) for one, other in zip(there, here, strict=True))
    assert lr != 0.1


def test_a_captured_training_step_is_the_eager_one(emulator: Emulator) -> None:
    """Forward, loss, backward and an update by torch's own operations, three times with other tokens."""
    torch.manual_seed(0)
    w = qn.quantize(torch.randn(64, 128))
    start = torch.randn(8, 128) / 11, torch.randn(64, 8)
    x = torch.empty(40, 128, dtype=torch.bfloat16)
    tokens = [torch.randn(40, 128).bfloat16() for _ in range(3)]
    there, here = ([t.clone().requires_grad_() for t in start] for _ in "ab")

    def step(params: list[Tensor]) -> None:
        loss = qn.lora_linear(x, w, params[0], params[1], 2.0).float().square().mean()
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.data.sub_(grad * 1e-2)

    x.copy_(tokens[0])
    with captured(emulator) as graph:
        step(there)
    for batch in tokens:
        x.copy_(batch)
        graph.replay()
        step(here)
    assert all(same_bytes(one, other) for one, other in zip(there, here, strict=True))
    assert not torch.equal(there[0], start[0])


def test_reading_a_value_spoils_a_capture(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="end_capture: CUDA failed with cudaErrorStreamCaptureInvalidated") as found:  # noqa: SIM117
        with captured(emulator):
            torch.ones(3).sum().item()
    cause = found.value.__context__
    assert cause is not None and "synchronize: CUDA failed with cudaErrorStreamCaptureUnsupported" in str(cause)


def test_memory_is_not_allocated_in_a_capture(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureInvalidated"):  # noqa: SIM117
        with captured(emulator):
            emulator.module.allocate(64)
    with captured(emulator, relaxed=True):
        address = emulator.module.allocate(64)
    emulator.module.release(address)
