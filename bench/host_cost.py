"""What an adapted layer costs the host, forward and backward, with kernels and GEMMs that cost nothing.

The calls are those of the GPU check's group ``host`` (gpu_passes.py), over tiny CPU tensors; ours take the CUDA path
over a native module of stubs. On a device that is ahead of the host, such a ratio is what counts.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from common import Bar, Bench, interleaved, timings
from gpu_passes import host_calls

import qlora_native as qn
from qlora_native.ops import _cuda_kernels, _cuda_products, _direct

TOKENS, N, K, RANK = 4, 32, 32, 4
BARS = (Bar("torch", 1.5),)  # of the host's time of plain torch
PLANS = {"fused": (2, 64, 64, 1, 3, 0, 0), "two steps": (_cuda_products.TWO_STEP, 0, 0, 1, 0, 0, 0)}


def pass_for_cuda(plan: tuple[int, ...]) -> None:
    """Products of CPU tensors take the CUDA path to the end, over kernels that do nothing."""
    module: Any = ModuleType("_cuda")
    module.plan_matmul = lambda question: plan
    module.linear_4bit = module.dequantize_4bit = lambda *arguments: None
    _cuda_kernels.native = lambda device: module  # type: ignore[assignment]
    _cuda_kernels.facts = lambda device: _cuda_kernels.Facts(90, 132)  # type: ignore[assignment]
    _cuda_kernels.current_device, _cuda_kernels.raw_stream = lambda: 0, lambda index: 0
    _cuda_kernels.is_capturing = lambda device: False
    # In place of fp32 products of 16-bit operands, which torch has on CUDA alone: of fp32 ones, of the same shapes.
    operands = {m: (torch.zeros(m, TOKENS), torch.zeros(TOKENS, n)) for m, n in ((RANK, K), (N, RANK))}
    _cuda_products.wide_product = lambda left, right: torch.mm(*operands[len(left)])
    _cuda_products.plan_of.cache_clear()
    _direct._DEVICES, _direct._TENSOR_KEYS = dict.fromkeys(_direct._DEVICES, "CUDA"), frozenset()


def main() -> None:
    bench = Bench("host_cost", __doc__, repeats=2000, threads=1)
    bench.begin()
    w = qn.quantize(torch.randn(N, K))
    for kind, dtype in (("fused", torch.bfloat16), ("two steps", torch.bfloat16), ("two steps", torch.float32)):
        pass_for_cuda(PLANS[kind])
        calls = host_calls(w, torch.randn(N, K, dtype=dtype), TOKENS, RANK)["host lora step"]
        seconds = interleaved(calls, bench.options.repeats, warmup=50)
        row = {"products": kind, "dtype": str(dtype), "match": True, **timings(seconds, BARS)}
        bench.add(row, "products", "dtype")
    bench.write()


if __name__ == "__main__":
    main()
