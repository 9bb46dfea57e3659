"""quantize and dequantize, interleaved with bitsandbytes, torchao and torch's own copy and fill of the same bytes.

    python bench/bench_quantize.py --json bench/results/quantize.json

Every row says whether our bytes equal the plain-torch truth. The floor is the time of as many bytes as the op must read
and write at the rate of the row's own copy; an op that reads more than it writes may beat it. Quantising returns new
tensors: `ours` mostly gets pages that the allocator has had before, `ours_fresh_pages` keeps every result, so that the
system must hand out new ones, `ours_in_place` allocates nothing. Dequantising writes into a warm `out`, which
bitsandbytes does not take on a CPU. It and torchao are timed when they are importable, at what they offer.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from common import ceilings, interleaved, machine, quartiles, write_json

import qlora_native as qn
from qlora_native import _C, _native, reference
from qlora_native.cases import FLOAT_DTYPES, QUANT_TYPES

SHAPES = ((4096, 4096), (14336, 4096))
BLOCK_SIZE = 64

Functions = dict[str, Callable[[], Any]]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def matches(t: torch.Tensor, w: qn.QuantizedWeight) -> bool:
    """Whether packed bytes and scales are those of the reference."""
    packed, absmax = reference.quantize_blocks(t, QUANT_TYPES.index(w.quant_type), BLOCK_SIZE)
    if w.nested_absmax is None or w.nested_offset is None:
        return same(w.packed, packed) and same(w.absmax, absmax)
    codes, nested_absmax, offset = reference.quantize_scales(absmax)
    pairs = ((w.packed, packed), (w.absmax, codes), (w.nested_absmax, nested_absmax), (w.nested_offset, offset))
    return all(same(a, b) for a, b in pairs)


def quantise_in_place(t: torch.Tensor, w: qn.QuantizedWeight) -> Callable[[], None]:
    """The native calls on memory that exists."""
    block_max = torch.empty(w.absmax.numel())
    number = QUANT_TYPES.index(w.quant_type)

    def run() -> None:
        target = w.absmax if w.nested_absmax is None else block_max
        _C.quantize_4bit(
            t.data_ptr(),
            _native.DTYPE_NUMBER[t.dtype],
            t.numel(),
            BLOCK_SIZE,
            number,
            w.packed.data_ptr(),
            target.data_ptr(),
        )
        if w.nested_absmax is not None and w.nested_offset is not None:
            _C.quantize_scales(
                target.data_ptr(),
                target.numel(),
                w.absmax.data_ptr(),
                w.nested_absmax.data_ptr(),
                w.nested_offset.data_ptr(),
            )

    return run


def bitsandbytes_quantise(t: torch.Tensor, quant_type: str, nested: bool) -> tuple[Callable[[], Any], Any] | None:
    """Their quantise, and its result, or None."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return None

    def run() -> Any:
        return quantize_4bit(t, blocksize=BLOCK_SIZE, compress_statistics=nested, quant_type=quant_type)

    return run, run()


def torchao_quantise(t: torch.Tensor) -> tuple[Callable[[], Any], Any] | None:
    """Their NF4 with double quantisation, and its result, or None."""
    try:
        to_nf4 = importlib.import_module("torchao.dtypes.nf4tensor").to_nf4
    except ImportError:
        return None
    return lambda: to_nf4(t, BLOCK_SIZE, 256), to_nf4(t, BLOCK_SIZE, 256)


def keeping(function: Callable[[], Any]) -> Callable[[], None]:
    """The function, whose results stay alive."""
    kept: list[Any] = []
    return lambda: kept.append(function())


def rows(
    shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype
) -> list[tuple[str, Functions, bool, int]]:
    """Direction, functions to time, whether ours matches, and the bytes that must be moved."""
    t = (torch.randn(shape) / shape[1] ** 0.5).to(dtype)
    w = qn.quantize(t, quant_type=quant_type, double_quant=nested)
    out, other = torch.empty_like(t), t.clone()
    num_bytes = t.numel() * t.itemsize + w.nbytes
    quantise: Functions = {
        "ours": lambda: qn.quantize(t, quant_type=quant_type, double_quant=nested),
        "ours_in_place": quantise_in_place(t, w),
        "copy": lambda: out.copy_(t),
    }
    dequantise: Functions = {
        "ours": lambda: w.dequantize(out=out),
        "copy": lambda: out.copy_(other),
        "fill": lambda: out.fill_(1.0),
    }
    matched = matches(t, w)
    quantise["ours_in_place"]()
    matched = matched and matches(t, w)
    peer = bitsandbytes_quantise(t, quant_type, nested) if dtype == torch.bfloat16 else None
    if peer is not None:
        from bitsandbytes.functional import dequantize_4bit

        packed, state = peer[1]
        quantise["bitsandbytes"] = peer[0]
        dequantise["bitsandbytes"] = lambda: dequantize_4bit(packed, state)
    ao = torchao_quantise(t) if dtype == torch.bfloat16 and quant_type == "nf4" and nested else None
    if ao is not None:
        quantise["torchao"] = ao[0]
        dequantise["torchao"] = ao[1].get_original_weight
    w.dequantize(out=out)
    decoded = same(out, reference.dequantize(dtype, *w.op_args()))
    return [("quantize", quantise, matched, num_bytes), ("dequantize", dequantise, decoded, num_bytes)]


def timed(functions: Functions, repeats: int) -> dict[str, list[float]]:
    """The quick ones many times; those that take a fifth of a second or more a few times, and still in turns."""
    once = interleaved(functions, 1, warmup=1)
    slow = {name for name, seconds in once.items() if seconds[0] > 0.2}
    quick = interleaved({name: f for name, f in functions.items() if name not in slow}, repeats)
    if slow:
        kept = {name: f for name, f in functions.items() if name in slow or name == "ours"}
        quick.update({name: s for name, s in interleaved(kept, 5, warmup=0).items() if name in slow})
    return quick


def main() -> None:
    """Parse, run, print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--only-n", type=int, help="one N of the shapes")
    parser.add_argument("--dtypes", nargs="+", default=[str(d).removeprefix("torch.") for d in FLOAT_DTYPES])
    parser.add_argument("--json", help="file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"bench": "quantize", "machine": machine(), "ceilings": ceilings(), "rows": []}
    print(json.dumps(result["machine"]), json.dumps(result["ceilings"]))
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    for shape, quant_type, nested, dtype in itertools.product(SHAPES, QUANT_TYPES, (True, False), dtypes):
        if arguments.only_n not in (None, shape[0]):
            continue
        for direction, functions, match, num_bytes in rows(shape, quant_type, nested, dtype):
            seconds = timed(functions, arguments.repeats)
            if direction == "quantize":
                seconds |= interleaved({"ours_fresh_pages": keeping(functions["ours"])}, 9, warmup=1)
            medians = {name: quartiles(values) for name, values in seconds.items()}
            bandwidth = 2 * shape[0] * shape[1] * dtype.itemsize / medians["copy"][1]
            row: dict[str, Any] = {
                "direction": direction,
                "n": shape[0],
                "k": shape[1],
                "quant_type": quant_type,
                "double_quant": nested,
                "dtype": str(dtype).removeprefix("torch."),
                "match": match,
                "ms": {name: [round(1e3 * q, 3) for q in values] for name, values in medians.items()},
                "times_ours": {n: round(v[1] / medians["ours"][1], 3) for n, v in medians.items() if n != "ours"},
                "ours_gb_per_s": round(num_bytes / medians["ours"][1] / 1e9, 1),
                "fraction_of_floor": round(num_bytes / bandwidth / medians["ours"][1], 3),
            }
            pairs = zip(seconds["ours"], seconds["copy"], strict=True)
            row["ours_over_copy"] = [round(q, 3) for q in quartiles([a / b for a, b in pairs])]
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
