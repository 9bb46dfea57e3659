"""The timing of GPU work, with a stand-in for the GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from laws import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import replay


def test_copies_are_more_than_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "l2_bytes", lambda device: 50 << 20)
    for num_bytes in (1 << 20, 9 << 20, 60 << 20, 200 << 20):
        assert replay.copies(num_bytes, torch.device("cpu"), most=1000) * num_bytes > 2 * (50 << 20)


class Device:
    """Stands in for torch.cuda in the replays: a clock that its work advances, and a log of what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # milliseconds
        self.log: list[str] = []
        self.calls: list[Callable[[], None]] | None = None  # while a graph is captured
        names = ("device", "stream", "current_stream", "synchronize", "Stream", "CUDAGraph", "Event", "graph")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def work(self, milliseconds: float) -> None:
        if self.calls is not None:
            self.calls.append(lambda: self.work(milliseconds))
        else:
            self.log.append("work")
            self.now += milliseconds

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    stream = device

    def current_stream(self) -> Device:
        return self

    Stream = current_stream

    def wait_stream(self, other: object) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    class CUDAGraph:
        calls: list[Callable[[], None]]

        def replay(self) -> None:
            for call in self.calls:
                call()

    @contextmanager
    def graph(self, graph: CUDAGraph) -> Iterator[None]:
        self.calls = graph.calls = []
        try:
            yield
        finally:
            self.calls = None

    def Event(self, enable_timing: bool) -> Any:
        class Event:
            def record(event) -> None:
                event.at = self.now

            def synchronize(event) -> None:
                self.log.append("synchronize")

            def elapsed_time(event, end: Any) -> float:
                return float(end.at - event.at)

        return Event()


def test_a_graph_is_replayed_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    made = replay.Replay([lambda: device.work(2.0), lambda: device.work(4.0)], torch.device("cuda", 0))
    assert device.log == ["wait", "work", "work", "wait", "synchronize"] and not made.refused, (
        "warmed up, then captured"
    )
    assert made.seconds() == pytest.approx(3e-3), "of one call"
    assert device.log[5:] == ["work", "work", "synchronize"]


def test_what_cannot_stand_in_a_graph_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def waits() -> None:
        if device.calls is not None:
            raise RuntimeError("not permitted\nand more")
        device.work(2.0)

    made = replay.Replay([waits], torch.device("cuda", 0))
    assert made.refused == "not permitted"
    assert made.seconds() == pytest.approx(2e-3)
