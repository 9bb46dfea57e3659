"""Products with weights in GGUF's block formats and bf16 activations, interleaved with NF4's and with ggml's.

    python bench/bench_gguf.py --json
    QLORA_NATIVE_ISA=avx2 python bench/bench_gguf.py --json
    python bench/any_file_page.py --write

Rows: the forward and the input gradient of every format. `nf4` is our product with a weight [N, K] in NF4, whose bytes
are others; `ggml` is ggml's with the same bytes, which rounds x to 8 bits and has no gradient (ggml_peer.py). For few
rows of x each rotates over copies of the weight, four times the last-level cache in all.
"""

from __future__ import annotations

import itertools
from statistics import median
from typing import Any

import ggml_peer
import isa_env  # noqa: F401  (before torch)
import torch
from cases import GGUF_TYPES, TOLERANCE
from ceilings import ceilings
from common import Bar, Bench, interleaved, relative_error, timings
from linear_contenders import copied, copies, product_of, rotation

import qlora_native as qn

MANY = 64  # rows of x from which on a format is to be as fast as NF4
STREAMED = ("q4_0", "q4_1", "q8_0")  # whose product of one row is compared with ggml's


def weight_of(quant_type: str, n: int, k: int) -> qn.QuantizedWeight:
    """Random values in the format, by ggml; or random bytes under scales of a moderate size."""
    made = ggml_peer.quantize(torch.randn(n, k) / k**0.5, quant_type)
    options: dict[str, Any] = {"shape": (n, k), "dtype": torch.bfloat16, "quant_type": quant_type}
    if made is not None:
        return qn.QuantizedWeight.of_blocks(made.packed, **options)
    w = qn.QuantizedWeight.empty((n, k), dtype=torch.bfloat16, quant_type=quant_type)
    w.packed.random_(0, 256)
    blocks = w.packed.view(n * k // w.block_size, -1)
    if quant_type == "mxfp4":  # an exponent
        blocks[:, 0] = 118
        return w
    for at in (208,) if quant_type == "q6_k" else (0, 2):
        blocks[:, at : at + 2] = torch.full((len(blocks), 1), 1e-3).half().view(torch.uint8)
    return w


def row(w: qn.QuantizedWeight, nf4: qn.QuantizedWeight, m: int, forward: bool, repeats: int) -> dict[str, Any]:
    n, k = w.shape
    t = torch.randn(m, k if forward else n, dtype=torch.bfloat16)

    def product(weight: qn.QuantizedWeight) -> Any:
        turn = rotation(lambda: product_of(copied(weight), forward), weight.nbytes, m)
        return lambda: turn()(t)

    functions = {"ours": product(w), "nf4": product(nf4)}
    ggml = ggml_peer.library() if forward and m == 1 else None
    if ggml is not None:
        peer = ggml_peer.Weight(ggml, w.quant_type, w.packed, w.shape)
        functions["ggml"] = ggml_peer.Product(peer, t, copies(w.nbytes, m))
    dense = w.dequantize().double()
    error = relative_error(functions["ours"](), t.double() @ (dense.t() if forward else dense))
    bars = [Bar("nf4", 1.15)] if m >= MANY else []
    if m == 1 and w.quant_type in STREAMED:  # both read the same bytes: the ratio of speeds is that of bandwidths
        bars = [Bar("ggml", 0.8, faster=True)]
    seconds = interleaved(functions, repeats * (4 if m == 1 else 1))
    rate = w.nbytes / median(seconds["ours"]) / 1e9
    return {"match": error < TOLERANCE[torch.bfloat16], "gb_per_s": round(rate, 1), **timings(seconds, bars)}


@torch.no_grad()
def main() -> None:
    sizes = {"m": (1, 64, 256, 1024), "n": 4096, "k": 4096}
    bench = Bench("gguf", __doc__, repeats=11, types=GGUF_TYPES, **sizes)
    bench.begin(ceilings=ceilings())
    n, k = bench.options.n, bench.options.k
    nf4 = qn.quantize(torch.randn(n, k) / k**0.5)
    for quant_type in bench.options.types:
        w = weight_of(quant_type, n, k)
        for m, direction in itertools.product(bench.options.m, ("forward", "grad_input")):
            if m > 1 or direction == "forward":
                head = {"type": quant_type, "direction": direction, "m": m, "n": n, "k": k}
                found = row(w, nf4, m, direction == "forward", bench.options.repeats)
                bench.add(head | found, "type", "direction", "m", "gb_per_s")
    bench.write()


if __name__ == "__main__":
    main()
