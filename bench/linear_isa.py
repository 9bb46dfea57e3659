"""linear in fp32 under an instruction set without BF16, against oneDNN's prepacked fp32 product limited to the same.

Either side is a process of its own, since both choose their kernels once; they take turns. Used by bench_linear.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from ceilings import Ceilings, floor, prepacked
from children import Child, serve
from common import Bar, relative_error, timings

import qlora_native as qn
from qlora_native.cases import TOLERANCE

# QLORA_NATIVE_ISA and the value of ONEDNN_MAX_CPU_ISA that stands for the same instructions.
ISAS = {"avx2": "AVX2", "avx512": "AVX512_CORE"}
BARS = (Bar("onednn_prepacked", 1.05),)
PAUSE = 0.02  # seconds: OpenMP's threads of the side that just ran spin for a while and would disturb the other


def worker(side: str, m: int, n: int, k: int, threads: int) -> None:
    """Serves one side: "run" answers with seconds, "error" with the error against fp64, "isa" with ours in use."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    w = qn.quantize(torch.randn(n, k, dtype=torch.bfloat16) / k**0.5)
    x = torch.randn(m, k)
    values = w.dequantize(torch.float32)
    product = prepacked(values, m) if side == "onednn" else lambda t: qn.linear(t, w)

    def answer(command: list[str]) -> dict[str, Any]:
        if command == ["isa"]:
            return {"isa": qn.build_info()["cpu_isa"]}
        if command == ["error"]:
            return {"error": relative_error(product(x), x.double() @ values.double().t())}
        product(x)
        started = time.perf_counter()
        product(x)
        return {"seconds": time.perf_counter() - started}

    with torch.no_grad():
        serve(answer)


def row(isa: str, m: int, n: int, k: int, repeats: int, measured: Ceilings) -> dict[str, Any]:
    """One row of bench_linear."""
    shape = ["--m", str(m), "--n", str(n), "--k", str(k), "--threads", str(torch.get_num_threads())]
    command = [os.path.abspath(__file__), *shape]
    sides = {
        "ours": Child("ours", [*command, "--side", "ours"], {"QLORA_NATIVE_ISA": isa}),
        "onednn_prepacked": Child("oneDNN", [*command, "--side", "onednn"], {"ONEDNN_MAX_CPU_ISA": ISAS[isa]}),
    }
    errors = {name: float(f"{side.ask('error')['error']:.2g}") for name, side in sides.items()}
    in_use = sides["ours"].ask("isa")["isa"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sorted(sides, reverse=bool(turn % 2)):
            time.sleep(PAUSE)
            seconds[name].append(sides[name].ask("run")["seconds"])
    for side in sides.values():
        side.end()
    num_bytes = 33 / 64 * n * k + 4 * m * (n + k)
    least = floor(measured, num_bytes, flops=2 * m * n * k, dtype="fp32")
    match = in_use == isa and errors["ours"] < TOLERANCE[torch.float32]
    head = {"direction": "forward", "isa": isa, "dtype": "float32", "m": m, "n": n, "k": k}
    return head | {"match": match, "relative_error": errors} | timings(seconds, BARS, least)


def main() -> None:
    """The child's command line."""
    parser = argparse.ArgumentParser(description="A side of the rows of bench_linear that force an instruction set.")
    parser.add_argument("--side", choices=("ours", "onednn"), required=True)
    for name in ("m", "n", "k", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    worker(arguments.side, arguments.m, arguments.n, arguments.k, arguments.threads)


if __name__ == "__main__":
    main()
