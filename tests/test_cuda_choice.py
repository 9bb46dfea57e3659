"""The way of a CUDA product that is measured on the card: both give the same bits, and the faster one is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from emulated import Emulator
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_choice, _cuda_kernels, _cuda_products
from qlora_native.ops._engine import Adapter

N, K, RANK = 64, 128, 8
CARD = ("NVIDIA H100 80GB HBM3", "13000", "2.13.0+cu130", "0.1.0")
FUSED, TWO_STEPS = 0, 1  # indices of the ways


class Measured:
    """The emulated card on which products of 17 tokens and more are measured, with times that the test gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.card: Any = CARD
        self.times = [1e-3, 2e-3]  # by way
        self.measured: list[Tensor] = []
        self.w = qn.quantize(torch.randn(N, K))
        monkeypatch.setenv("QLORA_NATIVE_CACHE", str(folder))
        monkeypatch.setattr(_cuda_choice, "card", lambda module, device: self.card)
        monkeypatch.setattr(_cuda_choice, "seconds", self.seconds)
        monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: False)
        _cuda_choice._answers.cache_clear()

    def seconds(self, run: Callable[[], Tensor], device: torch.device) -> float:
        self.measured.append(run())
        return self.times[(len(self.measured) - 1) % 2]

    def way_of(self, m: int = 40) -> int:
        """The way that a product takes: whether it decodes, what was measured apart."""
        before, decoded = len(self.measured), []
        two_step = _cuda_products.Cuda._two_step

        def counted(*given: Any) -> Tensor:
            decoded.append(given)
            return two_step(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_cuda_products.Cuda, "_two_step", counted)
            qn.linear(torch.randn(m, K).bfloat16(), self.w)
        return len(decoded) - (len(self.measured) - before) // 2

    def new_process(self) -> None:
        self.measured.clear()
        _cuda_choice._answers.cache_clear()


@pytest.fixture
def card(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measured:
    return Measured(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("is_forward", [True, False])
@pytest.mark.parametrize("m", [17, 40, 130])
def test_both_ways_give_equal_bits(emulator: Emulator, m: int, is_forward: bool, has_adapter: bool) -> None:
    """On operands whose sums are exact in fp32, so that no order of them rounds: levels times -1, 0 and 1."""
    w = qn.quantize(torch.randint(-8, 9, (N, K)) / 8, double_quant=False)
    w.absmax.fill_(2.0)
    x, low, up = (torch.randint(-1, 2, (m, size)).bfloat16() for size in (K if is_forward else N, RANK, RANK))
    up = torch.randint(-1, 2, (N, RANK) if is_forward else (RANK, K)).bfloat16()
    adapter = Adapter(low, up) if has_adapter else None
    engine = _cuda_products.Cuda(emulator.module)
    weight = qn.ops._operands.Weight(*w.op_args())
    sizes = _cuda_products.Sizes(m, N, K, RANK if has_adapter else 0, 64, 1, is_forward)
    plans = _cuda_products.plan_of(emulator.module, sizes, x.device, 0, True), _cuda_products.TWO_STEPS
    assert plans[0].kind != _cuda_products.TWO_STEP
    fused, two_steps = (engine.product(is_forward, x, weight, None, adapter, plan) for plan in plans)
    assert fused.any() and torch.equal(fused, two_steps)


@pytest.mark.parametrize("faster", [FUSED, TWO_STEPS])
def test_the_faster_way_is_taken_kept_and_logged(
    card: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture, faster: int
) -> None:
    card.times[faster] = 1e-4
    with caplog.at_level(logging.INFO, "qlora_native"):
        assert card.way_of() == faster and len(card.measured) == 2
        assert card.way_of() == faster and len(card.measured) == 2
    assert card.way_of(64) == faster and len(card.measured) == 2  # up to the same power of two
    (line,) = caplog.messages
    assert CARD[0] in line and "0.0001" in line and str(N) in line
    (file,) = (tmp_path / "cache").glob("*.json")
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert stored == {"card": list(CARD), "answers": [[64, N, K, 0, 64, 1, True, 0, faster]]}

    card.new_process()
    card.times.reverse()
    assert card.way_of() == faster and not card.measured  # read again
    assert card.way_of(65) == 1 - faster and len(card.measured) == 2  # more tokens are measured apart
    assert len(json.loads(file.read_text(encoding="utf-8"))["answers"]) == 2


@pytest.mark.parametrize("place", range(len(CARD)))
def test_another_card_driver_or_version_is_measured_anew(card: Measured, place: int) -> None:
    assert card.way_of() == FUSED
    card.new_process()
    card.card = (*CARD[:place], "another", *CARD[place + 1 :])
    card.times.reverse()
    assert card.way_of() == TWO_STEPS and len(card.measured) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"card": 1}', '{"answers": []}'])
def test_a_damaged_file_is_written_again(card: Measured, tmp_path: Path, text: str) -> None:
    assert card.way_of() == FUSED
    (file,) = (tmp_path / "cache").glob("*.json")
    sound = file.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    card.new_process()
    assert card.way_of() == FUSED and len(card.measured) == 2
    assert file.read_text(encoding="utf-8") == sound


def test_a_folder_that_cannot_be_written_costs_the_file_alone(card: Measured, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    assert [card.way_of(), card.way_of()] == [FUSED, FUSED] and len(card.measured) == 2


def test_a_capture_takes_the_plan_and_keeps_no_answer(
    card: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card.times.reverse()
    monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: True)
    assert card.way_of() == FUSED and not card.measured and not (tmp_path / "cache").exists()
    monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: False)
    assert card.way_of() == TWO_STEPS
    monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: True)
    assert card.way_of() == TWO_STEPS  # what is known holds there too


def test_few_tokens_and_many_are_not_measured(card: Measured) -> None:
    ways = [card.way_of(m) for m in (1, 16, 2048)]
    assert ways == [FUSED, FUSED, TWO_STEPS] and not card.measured


def test_the_variable_and_other_devices_turn_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD[0])
    module: Any = ModuleType("_cuda")
    module.driver_version = lambda: 13000
    found = []
    for name, value in (("cuda:0", ""), ("cuda:0", "1"), ("cuda:0", "0"), ("cpu", "1")):
        monkeypatch.setenv("QLORA_NATIVE_MEASURE_KERNELS", value)
        _cuda_choice.card.cache_clear()
        found.append(_cuda_choice.card(module, torch.device(name)))
    expected = (CARD[0], "13000", str(torch.__version__), qn.__version__)
    assert found == [expected, expected, None, None]
    _cuda_choice.card.cache_clear()


def test_the_time_is_the_least_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the operands lies in the L2 cache: as many other bytes are written before each."""
    calls, times = MagicMock(), iter([9.0, 3.0, 2.0, 4.0, 5.0])
    calls.Event.return_value.elapsed_time = lambda end: next(times)
    monkeypatch.setattr(torch.cuda, "Event", calls.Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 10))
    monkeypatch.setattr(torch, "empty", calls.empty)
    monkeypatch.setattr(_cuda_kernels, "current_device", lambda: 0)
    monkeypatch.setattr(_cuda_kernels, "raw_stream", lambda index: 0)
    assert _cuda_choice.seconds(calls.run, torch.device("cuda", 0)) == pytest.approx(2e-3)
    assert calls.empty.call_args.args == (1 << 10,)
    names = [name for name, *_ in calls.mock_calls if name.endswith(("zero_", "record", "run", "synchronize"))]
    assert names == ["empty().zero_", "Event().record", "run", "Event().record", "Event().synchronize"] * 5
