"""GPU time without launch overhead, and what the card can do: the basis of gpu_check.py.

A contender is a list of calls, one a copy of its weight, so that the copies together are more than twice the L2 cache
and no call finds its weight there. They are captured in one CUDA graph; a replay's time between two events, divided by
the number of calls, is a sample. Without a GPU (a dry run) the calls are timed by the clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import Seconds, rounded

Call = Callable[[], Any]
Ceilings = dict[str, float]
COPY_BYTES, PRODUCT_SIZE = 1 << 30, 8192


def on_gpu() -> bool:
    """Whether this is the real thing."""
    return torch.cuda.is_available()


def device() -> str:
    """Where the operands stand."""
    return "cuda" if on_gpu() else "cpu"


def l2_bytes() -> int:
    """The L2 cache of the card, 1 MiB in a dry run."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size) if on_gpu() else 1 << 20


def copies(num_bytes: int, most: int = 64) -> int:
    """How many weights of so many bytes to rotate over."""
    return max(1, min(most, 1 + 2 * l2_bytes() // max(1, num_bytes)))


class Replay:
    """A contender, ready to be timed. ``captured`` is False where a call cannot stand in a graph."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self.captured = False
        if not on_gpu():
            return
        self._warm_up()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._kept = [call() for call in self.calls]
            self.graph, self.captured = graph, True
        except Exception as error:  # a call that waits for the device or allocates behind torch's back
            torch.cuda.synchronize()
            print(f"not captured in a CUDA graph, timed with its launches: {str(error).splitlines()[0][:120]}")

    def _warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def _run(self) -> None:
        if self.captured:
            self.graph.replay()
        else:
            for call in self.calls:
                call()

    def seconds(self) -> float:
        """Of one call, from one replay."""
        if not on_gpu():
            started = time.perf_counter()
            self._run()
            return (time.perf_counter() - started) / len(self.calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(self.calls)


def interleaved_replays(contenders: Mapping[str, Sequence[Call]], rounds: int) -> Seconds:
    """Samples of each contender, replayed in turns in a changing order."""
    replays = {name: Replay(calls) for name, calls in contenders.items()}
    for replay in replays.values():
        replay.seconds()
    seconds: Seconds = {name: [] for name in replays}
    order = random.Random(0)
    for _ in range(rounds):
        for name, replay in order.sample(list(replays.items()), len(replays)):
            seconds[name].append(replay.seconds())
    return seconds


def ceilings(rounds: int = 9) -> Ceilings:
    """Copy bandwidth, bytes read plus bytes written, in GB/s; torch's best bf16 product in TFLOP/s."""
    count, size = (COPY_BYTES, PRODUCT_SIZE) if on_gpu() else (1 << 20, 256)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device()) for _ in range(2))
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    copied = interleaved_replays({"copy": [lambda: target.copy_(source)]}, rounds)["copy"]
    multiplied = interleaved_replays({"mm": [lambda: torch.mm(a, b.t(), out=product)]}, rounds)["mm"]
    return {
        "copy_gb_per_s": rounded([2 * count / min(copied)], 1e-9)[0],
        "bf16_tflop_per_s": rounded([2 * size**3 / min(multiplied)], 1e-12)[0],
    }


def floor(measured: Ceilings, num_bytes: float, flops: float = 0.0) -> float:
    """Seconds: the longer of moving the bytes and doing the operations at the measured rates."""
    moving = num_bytes / measured["copy_gb_per_s"] / 1e9
    return max(moving, flops / measured["bf16_tflop_per_s"] / 1e12)


def peak_bytes(call: Call) -> int | None:
    """What one call takes at most beyond what stands already; None in a dry run."""
    if not on_gpu():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def card() -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if not on_gpu():
        return found | {"name": "dry run on a CPU: no figure below says anything about a GPU"}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_mib": properties.total_memory >> 20,
        "l2_mib": l2_bytes() >> 20,
    }
