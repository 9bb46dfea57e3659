"""linear and its input gradient, interleaved with dequantise + torch's GEMM, 16-bit torch and bitsandbytes.

    python bench/bench_linear.py --json bench/results/linear.json

Every row says whether our result matches the fp64 truth. Weights rotate over copies that together exceed the last-level
cache where M <= 16, so that small products read memory as a model does. bitsandbytes is timed when it is importable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import ceilings, interleaved, machine, quartiles, write_json

import qlora_native as qn
from qlora_native import reference
from qlora_native.cases import BENCH_PRODUCTS, TOLERANCE, Product

ROTATE_BYTES = 1 << 30  # of 16-bit weights, for small M


def cycle(values: list[Any]) -> Callable[[], Any]:
    """Each call gives the next value, round and round."""
    iterator: Iterator[Any] = itertools.cycle(values)
    return lambda: next(iterator)


def bitsandbytes_layer(dense: torch.Tensor) -> Any:
    """Their layer in training mode, or None."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        return None
    n, k = dense.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
    layer.weight = Params4bit(dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").train()


def contenders(case: Product, direction: str) -> tuple[dict[str, Callable[[], Any]], bool]:
    """The functions to time, and whether ours matches the truth."""
    copies = max(2, ROTATE_BYTES // (2 * case.n * case.k)) if case.m <= 16 else 1
    dense = [torch.randn(case.n, case.k, dtype=torch.bfloat16) / case.k**0.5 for _ in range(min(copies, 8))]
    dense += [t.clone() for t in itertools.islice(itertools.cycle(dense), copies - len(dense))]
    ours = [qn.quantize(t) for t in dense]
    next_dense, next_ours = cycle(dense), cycle(ours)
    buffer = torch.empty(
        case.n, case.k, dtype=torch.bfloat16
    )  # warm: the rival at its best, at the price of its memory
    layer = bitsandbytes_layer(dense[0])

    if direction == "forward":
        x = torch.randn(case.m, case.k, dtype=torch.bfloat16)
        got = qn.linear(x, ours[0])
        truth = reference.linear(x, ours[0].dequantize())
        functions: dict[str, Callable[[], Any]] = {
            "ours": lambda: qn.linear(x, next_ours()),
            "dequantise_linear": lambda: F.linear(x, next_ours().dequantize()),
            "dequantise_into_buffer_linear": lambda: F.linear(x, next_ours().dequantize(out=buffer)),
            "bf16": lambda: F.linear(x, next_dense()),
        }
        if layer is not None:
            functions["bitsandbytes"] = lambda: layer(x)
    else:
        x = torch.randn(case.m, case.n, dtype=torch.bfloat16)
        op = torch.ops.qlora_native.linear_4bit_grad_input
        got = op(x, False, *ours[0].op_args())
        truth = (x.double() @ ours[0].dequantize().double()).to(x.dtype)
        functions = {
            "ours": lambda: op(x, False, *next_ours().op_args()),
            "dequantise_linear": lambda: x @ next_ours().dequantize(),
            "dequantise_into_buffer_linear": lambda: x @ next_ours().dequantize(out=buffer),
            "bf16": lambda: x @ next_dense(),
        }
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    return functions, error < TOLERANCE[torch.bfloat16]


def main() -> None:
    """Parse, run, print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only-n", type=int, help="one N of the table of cases")
    parser.add_argument("--json", help="file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"bench": "linear", "machine": machine(), "ceilings": ceilings(), "rows": []}
    print(json.dumps(result["machine"]), json.dumps(result["ceilings"]))
    with torch.no_grad():
        for case, direction in itertools.product(BENCH_PRODUCTS, ("forward", "grad_input")):
            if arguments.only_n not in (None, case.n):
                continue
            functions, match = contenders(case, direction)
            seconds = interleaved(functions, arguments.repeats)
            row: dict[str, Any] = {"m": case.m, "n": case.n, "k": case.k, "direction": direction, "match": match}
            row["ms"] = {name: [round(1e3 * q, 3) for q in quartiles(values)] for name, values in seconds.items()}
            row["ours_over"] = {
                name: [round(q, 3) for q in quartiles([a / b for a, b in zip(seconds["ours"], values, strict=True)])]
                for name, values in seconds.items()
                if name != "ours"
            }
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
