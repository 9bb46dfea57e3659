"""What the card can do, and the time of contenders on it: the basis of gpu_check.py.

A contender is a list of calls, one a copy of its weight, replayed as a CUDA graph (replay.py).
Without a GPU (a dry run) the calls are timed by the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import Seconds, rounded
from replay import Call, Replay, in_turns, l2_bytes

Ceilings = dict[str, float]
COPY_BYTES, PRODUCT_SIZE = 1 << 30, 8192


def on_gpu() -> bool:
    """Whether this is the real thing."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where the operands stand."""
    return torch.device("cuda" if on_gpu() else "cpu")


def interleaved_replays(contenders: Mapping[str, Sequence[Call]], rounds: int) -> Seconds:
    """Samples of each contender, replayed in turns in a changing order."""
    replays = {name: Replay(calls, device()) for name, calls in contenders.items()}
    for name, replay in replays.items():
        if replay.refused:
            print(f"{name} is not captured in a CUDA graph, and timed with its launches: {replay.refused[:120]}")
    return in_turns(replays, rounds)


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
        "l2_mib": l2_bytes(device()) >> 20,
    }
