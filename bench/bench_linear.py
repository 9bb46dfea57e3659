"""Products with a 4-bit weight and bf16 activations, interleaved with torch, oneDNN, bitsandbytes and torchao.

    python bench/bench_linear.py --json
    QLORA_NATIVE_ISA=avx2 python bench/bench_linear.py --json
    python bench/plots.py linear

Rows: the forward and the input gradient for M = 1 to 1024; `lora_linear` forward and backward against the same of
`linear`. Contenders, which compute in fp32 on a CPU without a dot product for bf16:

    ours                            straight from the stored bytes
    ours_fp32                       the same for fp32 activations, where the rivals compute in fp32
    bf16, fp32                      torch's F.linear (its matmul, for the gradient)
    onednn_prepacked                oneDNN's product with the weight in its own layout, a copy made beforehand
    dequantize_into_buffer_linear   our decoder into a kept dense buffer, then torch's product
    bitsandbytes                    Linear4bit in training mode: dequantize, then torch's product
    bitsandbytes_inference          the same in evaluation mode: repacked, forward only
    torchao                         F.linear with its NF4 tensor
    ggml_iq4_nl                     its product with an IQ4_NL weight and x in 8 bits, from llama-cpp-python

Every row has the relative error of each contender against fp64 on the decoded weight (torchao's and ggml's differ), and
`match`: whether ours is within the tests' tolerance. The floor is the longer of moving all bytes once, at the
memory's rate between the same rounds, and of doing all operations at the best rate of this run (see ceilings.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import ggml_peer
import isa_env  # noqa: F401  (before torch)
import torch
from cases import BENCH_PRODUCTS, TOLERANCE, Product
from ceilings import Ceilings, MemoryProbes, ceilings, floor
from common import Bar, Bench, interleaved, interleaved_sparing, multiplies_bf16, relative_error, timings
from linear_contenders import PLAIN, Lora, Weights, products

DIRECTIONS = ("forward", "grad_input", "lora_forward_backward")
LORA_M = 1024

FEW = (Bar("onednn_prepacked", 1.2, faster=True),)
MANY = (Bar("onednn_prepacked", 1.0),)
BARS: dict[str, dict[int, tuple[Bar, ...]]] = {
    "forward": {
        1: (Bar("onednn_prepacked", 3.5, faster=True), Bar("bitsandbytes_inference", 1.3, faster=True)),
        16: FEW,
        64: FEW,
        256: MANY,
        1024: MANY,
    },
    "grad_input": {m: (Bar(PLAIN, 1.0),) for m in (16, 64, 256, 1024)},
    "lora_forward_backward": {LORA_M: (Bar("linear", 1.05),)},
}
if not multiplies_bf16():
    AS_FAST = (Bar("onednn_prepacked", 1.05),)
    BARS["forward"] = {1: (Bar(PLAIN, 3.0, faster=True),), 256: AS_FAST, 1024: AS_FAST}


def rounds(m: int, repeats: int) -> int:
    """More of the short ones."""
    return repeats * (4 if m <= 16 else 2 if m <= 64 else 1)


def significant(value: float) -> float:
    """Two digits."""
    return float(f"{value:.2g}")


def result(function: Callable[[], Any]) -> torch.Tensor:
    """What a contender computes; ggml leaves it in memory of its own."""
    value = function()
    return function.result() if isinstance(function, ggml_peer.Product) else value


def product_row(direction: str, weights: Weights, case: Product, repeats: int, measured: Ceilings) -> dict[str, Any]:
    is_forward = direction == "forward"
    t = torch.randn(case.m, case.k if is_forward else case.n, dtype=torch.bfloat16)
    functions = products(weights, case, t, is_forward)
    dense = weights.values.double()
    truth = t.double() @ (dense.t() if is_forward else dense)
    errors = {name: significant(relative_error(result(function), truth)) for name, function in functions.items()}
    probes = MemoryProbes()
    bars = BARS[direction].get(case.m, ())
    keep = ("ours", "ours_fp32", PLAIN, "onednn_prepacked", *(bar.rival for bar in bars))
    seconds = interleaved_sparing(functions | probes.jobs(), rounds(case.m, repeats), keep)
    rates = probes.rates(seconds)
    num_bytes = weights.ours.nbytes + 2 * case.m * (case.n + case.k)
    least = floor(measured | rates, num_bytes, flops=2 * case.m * case.n * case.k)
    row = {"match": errors["ours"] < TOLERANCE[torch.bfloat16], "relative_error": errors} | rates
    return row | timings(seconds, bars, least)


def lora_row(weights: Weights, case: Product, repeats: int, measured: Ceilings) -> dict[str, Any]:
    lora = Lora(weights, case)
    functions = lora.functions()
    error = lora.error(functions["ours"]())
    seconds = interleaved(functions, repeats)
    num_bytes = 2 * weights.ours.nbytes + 4 * case.m * (case.n + case.k)
    flops = 4 * case.m * case.n * case.k + 6 * case.m * case.r * (case.n + case.k)
    row = {"r": case.r, "match": error < TOLERANCE[torch.bfloat16], "relative_error": {"ours": significant(error)}}
    bars = BARS["lora_forward_backward"][LORA_M]
    return row | timings(seconds, bars, floor(measured, num_bytes, flops=flops))


@torch.no_grad()
def main() -> None:
    sizes = {"n": (4096, 14336), "m": (1, 16, 64, 256, 1024)}
    # Rounds of the long rows; short ones get up to 4 times as many, slow rivals 3.
    bench = Bench("linear", __doc__, repeats=11, directions=DIRECTIONS, **sizes)
    bench.begin(ceilings=ceilings())
    for n, cases in itertools.groupby(BENCH_PRODUCTS, key=lambda case: case.n):
        chosen = [case for case in cases if case.n in bench.options.n and case.m in bench.options.m]
        if not chosen:
            continue
        weights = Weights(n, chosen[0].k)
        for direction, case in itertools.product(bench.options.directions, chosen):
            given = weights, case, bench.options.repeats, bench.result["ceilings"]
            if direction != "lora_forward_backward":
                row = product_row(direction, *given)
            elif case.m == LORA_M:
                row = lora_row(*given)
            else:
                continue
            head = {"direction": direction, "dtype": "bfloat16", "m": case.m, "n": n, "k": case.k}
            bench.add(head | row, "direction", "n", "k", "m")
    bench.write()


if __name__ == "__main__":
    main()
