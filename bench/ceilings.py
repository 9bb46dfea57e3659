"""What this machine can do now, and the least time that a job of so many bytes and operations can take.

Rates of memory are those of torch's own multi-threaded loops over buffers far larger than the cache. The dot-product
rates are the best that oneDNN's prepacked products reach: lower bounds of the true peaks, so that a fraction of the
floor may come out above 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import cache_bytes, interleaved

Ceilings = dict[str, float]
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def prepacked(weight: torch.Tensor, m: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """oneDNN's product with a weight [N, K] in the layout that it chooses for m rows of x, as torch.compile uses it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def dot_rate(dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of the best of a few large products."""
    rates = []
    weight = torch.randn(4096, 4096).to(dtype)
    for m, rounds in ((256, 4 * repeats), (1024, repeats)):
        x = torch.randn(m, 4096).to(dtype)
        product = prepacked(weight, m)
        seconds = min(interleaved({"mm": lambda x=x, f=product: f(x)}, rounds)["mm"])  # type: ignore[misc]
        rates.append(2 * m * weight.numel() / seconds)
    return max(rates)


def memory_rates(repeats: int) -> Ceilings:
    """GB/s: read (a sum), write (a fill), copy (bytes read plus bytes written)."""
    num_bytes = max(512 << 20, 8 * cache_bytes())
    source = torch.ones(num_bytes // 8, dtype=torch.int64)
    target = torch.empty_like(source)
    target.fill_(1)
    jobs: dict[str, tuple[Callable[[], Any], int]] = {
        "read": (source.sum, num_bytes),
        "write": (lambda: target.fill_(2), num_bytes),
        "copy": (lambda: target.copy_(source), 2 * num_bytes),
    }
    seconds = interleaved({name: job for name, (job, _) in jobs.items()}, repeats, warmup=1)
    return {f"{name}_gb_per_s": moved / min(seconds[name]) / 1e9 for name, (_, moved) in jobs.items()}


def ceilings(repeats: int = 7, dots: bool = True) -> Ceilings:
    """The machine's rates: memory in GB/s, oneDNN's prepacked products in GFLOP/s."""
    found = memory_rates(repeats)
    if dots:
        for dtype, name in DTYPE_NAMES.items():
            found[f"onednn_{name}_gflop_per_s"] = dot_rate(dtype, repeats) / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def floor(measured: Ceilings, read: float, written: float = 0.0, flops: float = 0.0, dtype: str = "bf16") -> float:
    """Seconds: the longer of moving the bytes and doing the operations, each at its measured rate."""
    moving = read / measured["read_gb_per_s"] + written / measured["write_gb_per_s"]
    return max(moving, flops / measured[f"onednn_{dtype}_gflop_per_s"] if flops else 0.0) / 1e9
