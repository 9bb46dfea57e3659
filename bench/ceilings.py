"""What this machine can do now, and the least time that a job of so many bytes and operations can take.

Rates of memory are those of torch's own multi-threaded loops over buffers far larger than the cache. The rates of
products are the best that oneDNN's prepacked ones reach, in fp32 those of torch.mm (MKL's) too: lower bounds of the
true peaks, so that a fraction of the floor may come out above 1. On a CPU without a dot product for bf16 its rate is
that of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import Functions, Seconds, cache_bytes, interleaved, multiplies_bf16

Ceilings = dict[str, float]


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
        functions: Functions = {"onednn": partial(prepacked(weight, m), x)}
        if dtype == torch.float32:
            functions["mm"] = partial(torch.mm, x, weight.t())
        seconds = min(map(min, interleaved(functions, rounds).values()))
        rates.append(2 * m * weight.numel() / seconds)
    return max(rates)


class MemoryProbes:
    """Jobs to interleave with others, which show what the memory gives in the same minute: neighbors share it."""

    def __init__(self, num_bytes: int | None = None) -> None:
        count = (num_bytes or 4 * cache_bytes()) // 8
        self.source = torch.ones(count, dtype=torch.int64)
        self.target = torch.ones(count, dtype=torch.int64)

    def jobs(self) -> Functions:
        """A sum reads, a fill writes, a copy does both."""
        return {
            "probe read": self.source.sum,
            "probe write": lambda: self.target.fill_(2),
            "probe copy": lambda: self.target.copy_(self.source),
        }

    def rates(self, seconds: Seconds, of: Callable[[list[float]], float] = median) -> Ceilings:
        """Takes the probes' timings out of ``seconds``; GB/s, for a copy of bytes read plus bytes written."""
        found = {}
        for name in self.jobs():
            moved = self.source.nbytes * (2 if name == "probe copy" else 1)
            found[name.removeprefix("probe ") + "_gb_per_s"] = round(moved / of(seconds.pop(name)) / 1e9, 1)
        return found


def ceilings(repeats: int = 7, dots: bool = True) -> Ceilings:
    """The machine's best rates: memory in GB/s, products in GFLOP/s."""
    probes = MemoryProbes(max(512 << 20, 8 * cache_bytes()))
    found = probes.rates(interleaved(probes.jobs(), repeats, warmup=1), min)
    if dots:
        found["fp32_gflop_per_s"] = round(dot_rate(torch.float32, repeats) / 1e9, 1)
        fast = multiplies_bf16()
        found["bf16_gflop_per_s"] = (
            round(dot_rate(torch.bfloat16, repeats) / 1e9, 1) if fast else found["fp32_gflop_per_s"]
        )
    return found


def floor(measured: Ceilings, read: float, written: float = 0.0, flops: float = 0.0, dtype: str = "bf16") -> float:
    """Seconds: the longer of moving the bytes and doing the operations, each at its measured rate."""
    moving = read / measured["read_gb_per_s"] + written / measured["write_gb_per_s"]
    return max(moving, flops / measured[f"{dtype}_gflop_per_s"] if flops else 0.0) / 1e9
