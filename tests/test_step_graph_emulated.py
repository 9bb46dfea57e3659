"""Captures over the emulator: a training step replayed is the eager one bit for bit; what a capture refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import Emulator
from emulated_torch import captured
from helpers import same_bytes
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_kernels

RATES = (0.03, 0.02, 0.01, 0.005)


class Layers(torch.nn.Module):
    """Two adapted 4-bit layers and a 4-bit head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = [qn.quantize(torch.randn(shape) / 8) for shape in ((96, 64), (64, 96))]
        self.head = qn.quantize(torch.randn(101, 64) / 8)
        shapes = ((4, 64), (96, 4), (4, 96), (64, 4))
        self.adapters = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape) / 8) for shape in shapes])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        a, b, c, d = self.adapters
        hidden = torch.nn.functional.silu(qn.lora_linear(x, self.w[0], a, b, 2.0))
        return qn.linear_cross_entropy(qn.lora_linear(hidden, self.w[1], c, d, 0.7), self.head, labels)


class Run:
    """One of two runs of the same steps."""

    def __init__(self, rule: str, bits: int) -> None:
        self.model = Layers()
        first, *others = self.model.parameters()
        groups = [{"params": [first]}, {"params": others, "weight_decay": 0.1}]
        self.optimizer: Any = getattr(qn.optim, rule)(groups, lr=RATES[0], bits=bits, max_norm=1.0)
        self.x = torch.zeros(40, 64, dtype=torch.bfloat16)
        self.labels = torch.zeros(40, dtype=torch.int64)
        self.loss = torch.zeros(())

    def batch(self, number: int, rate: float) -> None:
        generator = torch.Generator().manual_seed(number)
        self.x.copy_(torch.randn(40, 64, generator=generator))
        self.labels.copy_(torch.randint(101, (40,), generator=generator))
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = rate, (0.9 - rate, 0.99)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(self.x, self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def state(self) -> list[Tensor]:
        states = [value for param in self.model.parameters() for value in self.optimizer.state[param].values()]
        return [t.clone() for t in (*self.model.parameters(), *states, self.loss, self.optimizer._grad_norm)]


@pytest.mark.parametrize(("rule", "bits"), [("AdamW", 32), ("AdamW", 8), ("Adam", 8), ("Lion", 32), ("Lion", 8)])
def test_a_captured_step_is_the_eager_one(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, rule: str, bits: int
) -> None:
    """Forward, loss, backward, clipping and the update, replayed with other tokens and options; then an eager step."""
    is_capturing = [False]
    monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: is_capturing[0])

    def refused(words: str) -> None:
        is_capturing[0] = True
        with pytest.raises(RuntimeError, match=words):
            there.step()
        is_capturing[0] = False

    there, here = Run(rule, bits), Run(rule, bits)
    for run in (there, here):
        run.batch(0, RATES[0])
    refused("run one step")
    for run in (there, here):
        run.step()  # makes the states and the optimizer's tables
    before = there.state()
    there.batch(0, RATES[1])
    refused("call write_options")
    there.batch(0, RATES[0])
    with captured(emulator) as graph:
        is_capturing[0] = True
        there.step()
        is_capturing[0] = False
    assert all(map(same_bytes, there.state(), before)), "a capture runs nothing"
    for number, rate in enumerate(RATES[1:], 1):
        for run in (there, here):
            run.batch(number, rate)
        there.optimizer.write_options()
        graph.replay()
        here.step()
        assert all(map(same_bytes, there.state(), here.state()))
        assert not torch.equal(there.state()[0], before[0])
    there.batch(9, RATES[0])  # a rate that is not written
    here.batch(9, RATES[-1])
    graph.replay()
    here.step()
    assert all(map(same_bytes, there.state(), here.state()))
    for run in (there, here):
        run.batch(10, RATES[0])
        run.step()  # after replays, by its own gradients
    assert all(map(same_bytes, there.state(), here.state()))


def test_a_captured_op_keeps_its_options(emulator: Emulator) -> None:
    """Of an op by itself, whose learning rate nothing writes again."""
    sizes = (9000, 9000, 9000, 9000, ())
    there = [[torch.zeros(size)] for size in sizes]  # a parameter, its gradient, both moments and the step
    there[1][0].normal_()
    here = [[tensor.clone()] for (tensor,) in there]

    def step(lists: list[list[Tensor]]) -> None:
        torch.ops.qlora_native.adamw_step(*lists[:4], [], [], lists[4], 0.1, 0.9, 0.99, 1e-8, 0.0, True, 1.0)

    with captured(emulator) as graph:
        step(there)
    assert not there[0][0].any(), "nothing has run"
    for _ in range(3):
        graph.replay()
        step(here)
    assert all(same_bytes(one, other) for (one,), (other,) in zip(there, here, strict=True))


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
