"""The time of GPU work without its launches.

A contender is a list of calls, one a copy of its weight, so that the copies together are more than twice the L2 cache
and no call finds its weight there. They are captured in one CUDA graph; a replay's time between two events, divided by
the number of calls, is a sample. On a device without graphs the calls are timed by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import Seconds, interleaved

Call = Callable[[], Any]


def l2_bytes(device: torch.device) -> int:
    """The L2 cache of a CUDA device; 16 KiB for any other."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 1 << 14


def copies(num_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many weights of so many bytes to rotate over; ``most`` may be too few for small ones."""
    return max(1, min(most, 1 + 2 * l2_bytes(device) // max(1, num_bytes)))


class Replay:
    """A contender, ready to be timed. ``refused`` says why its calls cannot stand in a graph, if they cannot."""

    def __init__(self, calls: Sequence[Call], device: torch.device, capture: bool = True) -> None:
        self.calls, self.device = list(calls), device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.refused = ""
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            self._warm_up()
            if not capture:
                return
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._call_all()
                self.graph = graph
            except Exception as error:  # a call that waits for the device or allocates behind torch's back
                torch.cuda.synchronize()
                self.refused = str(error).splitlines()[0]

    def _warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def _call_all(self) -> None:
        for call in self.calls:  # results are dropped at once: the next call takes their memory
            call()

    def seconds(self) -> float:
        """Of one call, from one replay."""
        run = self._call_all if self.graph is None else self.graph.replay
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) / len(self.calls)
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(self.calls)


def in_turns(replays: Mapping[str, Replay], rounds: int) -> Seconds:
    """Samples of each contender in seconds, replayed in turns in a changing order, after one that does not count."""
    samples: Seconds = {name: [] for name in replays}

    def sample(name: str) -> None:
        samples[name].append(replays[name].seconds())

    interleaved({name: partial(sample, name) for name in replays}, rounds, warmup=1)
    return {name: values[1:] for name, values in samples.items()}
