"""The copies of adapters that CUDA products keep: taken again within a step, never once the adapter changed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from emulated import Emulator
from helpers import same_bytes
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_copies, _cuda_kernels, _cuda_products

N, K, RANK, SCALE = 64, 96, 4, 0.75


class Layer:
    """An adapted layer, in bf16 by default, with fp32 adapters, and how often its adapters were copied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        self.w = qn.quantize(torch.randn(N, K))
        self.x, self.grad_y = torch.randn(5, K).to(dtype).requires_grad_(), torch.randn(5, N).to(dtype)
        self.a, self.b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((RANK, K), (N, RANK)))
        self.optimizer = torch.optim.SGD([self.a, self.b], lr=0.1)
        self.optimizer.step()  # without gradients it changes nothing
        self.copies = 0
        narrow = _cuda_products.Cuda.narrow

        def counted(engine: Any, tensor: Tensor, *options: Any) -> Tensor:
            self.copies += tensor is self.a or tensor is self.b
            return narrow(engine, tensor, *options)

        monkeypatch.setattr(_cuda_products.Cuda, "narrow", counted)

    def forward(self) -> Tensor:
        return qn.lora_linear(self.x, self.w, self.a, self.b, SCALE)

    def both(self) -> tuple[Tensor, ...]:
        """y and the gradients, also left in ``grad``."""
        self.a.grad = self.b.grad = None
        y = self.forward()
        y.backward(self.grad_y)
        assert self.a.grad is not None and self.b.grad is not None
        return y.detach(), self.a.grad, self.b.grad

    def is_fresh(self) -> bool:
        """Whether a pass gives the bytes of one without kept copies."""
        got = self.both()
        kept = dict(_cuda_copies._copies)
        _cuda_copies._copies.clear()
        expected = self.both()
        _cuda_copies._copies.update(kept)
        return all(map(same_bytes, got, expected))


@pytest.fixture
def layer(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Layer:
    monkeypatch.setattr(_cuda_copies, "_copies", {})
    return Layer(monkeypatch)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.bfloat16, 2), (torch.float32, 1)])  # A is in fp32 already
@pytest.mark.usefixtures("layer")
def test_copied_once_a_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, copies: int) -> None:
    layer = Layer(monkeypatch, dtype)
    first = layer.both()
    assert layer.copies == copies
    for _ in range(3):
        assert all(map(same_bytes, layer.both(), first))
    assert layer.copies == copies
    assert layer.is_fresh()


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: qn.optim.AdamW(params, lr=0.1),
    "AdamW, clipped": lambda params: qn.optim.AdamW(params, lr=0.1, max_norm=1.0),
    "Lion": lambda params: qn.optim.Lion(params, lr=0.1),
    "8 bits": lambda params: qn.optim.AdamW(params, lr=0.1, bits=8),
    "torch": lambda params: torch.optim.AdamW(params, lr=0.1),
    "torch, one by one": lambda params: torch.optim.SGD(params, lr=0.1, foreach=False),
}


def through_data(params: Sequence[Any]) -> None:
    """Writes as no version shows, as kernels do that are given a pointer."""
    for param in params:
        param.data.sub_(0.1 * param.grad)


class ThroughData(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        through_data(self.param_groups[0]["params"])


def by_hand(params: Sequence[Tensor]) -> Callable[[], None]:
    """As in a loop without an optimizer: nothing is kept."""
    _cuda_copies._copies.clear()
    return partial(through_data, params)


@torch.no_grad()
def step_by_op(params: Sequence[Tensor]) -> None:
    for param in params:
        states = [[torch.zeros_like(param)] for _ in range(2)]
        options = 0.1, 0.9, 0.99, 1e-8, 0.0, True, 1.0
        torch.ops.qlora_native.adamw_step([param], [param.grad], *states, [], [], [torch.zeros(())], *options)


def step_of(make: Callable[[Sequence[Tensor]], Any], params: Sequence[Tensor]) -> Callable[[], Any]:
    step: Callable[[], Any] = make(params).step
    return step


STEPS: dict[str, Callable[[Sequence[Tensor]], Callable[[], Any]]] = {
    **{name: partial(step_of, make) for name, make in OPTIMIZERS.items()},
    "paged": lambda params: qn.optim.AdamW(params, lr=0.1, paged=True).step,
    "through .data": lambda params: ThroughData(params, {}).step,
    "an op by itself": lambda params: partial(step_by_op, params),
    "by hand": by_hand,
}


@pytest.mark.parametrize("name", STEPS)
def test_fresh_after_a_step(layer: Layer, name: str) -> None:
    step = STEPS[name]([layer.a, layer.b])
    for _ in range(2):
        before = layer.both()
        step()
        assert not torch.equal(layer.both()[0], before[0])
        assert layer.is_fresh()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_shows_in_the_version(name: str) -> None:
    """Without it, autograd would let a graph that was recorded before a step be differentiated after it."""
    param = torch.nn.Parameter(torch.randn(8, 600))
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    OPTIMIZERS[name]([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def twice(param: Tensor) -> None:
    """The second value may get the memory of what the copies were made of."""
    param.data = torch.full_like(param, 1.0)
    param.data = torch.full_like(param, 2.0)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda p: p.copy_(torch.ones_like(p)),
    "through a view": lambda p: p[1:].zero_(),
    ".data =": lambda p: setattr(p, "data", torch.ones_like(p)),
    ".data = twice": twice,
    ".data = the same memory": lambda p: setattr(p, "data", p.data.as_strided(p.shape, (p.shape[1], 0))),
    "load_state_dict": lambda p: torch.nn.ParameterList([p]).load_state_dict({"0": torch.ones_like(p)}),
    "init": torch.nn.init.ones_,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["a", "b"])
@torch.no_grad()
def test_fresh_after_a_change(layer: Layer, change: str, which: str) -> None:
    with torch.enable_grad():
        before = layer.both()
    CHANGES[change](getattr(layer, which))
    with torch.enable_grad():
        assert not torch.equal(layer.both()[0], before[0])
        assert layer.is_fresh()


def test_nothing_is_kept_where_nothing_is_recorded(layer: Layer) -> None:
    """Averaged weights are often put in place for an evaluation through ``.data``, which nothing shows."""
    layer.both()
    before = layer.copies
    with torch.no_grad():
        layer.forward()
        assert layer.copies == before + 2
        layer.b.data.zero_()
        y = layer.forward()
        assert same_bytes(y, qn.lora_linear(layer.x, layer.w, layer.a, torch.zeros(N, RANK), SCALE))


def test_kept_no_longer_than_the_adapter(layer: Layer) -> None:
    layer.both()
    assert len(_cuda_copies._copies) == 2
    layer.a.grad = layer.b.grad = None
    del layer.a, layer.b, layer.optimizer
    gc.collect()
    assert not _cuda_copies._copies


def test_another_stream_makes_its_own(layer: Layer, emulator: Emulator) -> None:
    layer.both()
    emulator.stream = emulator.module.new_stream()
    layer.both()
    assert layer.copies == 4


def test_a_captured_step_ends_keeping(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    layer.both()
    with monkeypatch.context() as capturing:
        capturing.setattr(_cuda_kernels, "is_capturing", lambda device: True)
        layer.both()
        assert layer.copies == 2 + 4  # a graph has its own, for each use
        layer.optimizer.step()
    layer.both()
    layer.optimizer.step()
    layer.both()
    assert layer.copies == 2 + 3 * 4


def test_a_device_is_made_current_only_where_another_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    @contextmanager
    def guard(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    monkeypatch.setattr(_cuda_kernels, "current_device", lambda: 1)
    monkeypatch.setattr(_cuda_kernels, "raw_stream", lambda index: 100 + index)
    monkeypatch.setattr(torch.cuda, "device", guard)
    for name, guards in (("cuda:1", []), ("cuda", []), ("cuda:0", [0])):
        with _cuda_kernels.launching(torch.device(name)) as stream:
            assert entered == guards and stream == (100 if guards else 101)
