"""quantize and dequantize, interleaved with bitsandbytes, torchao and torch's own copy and fill of the same bytes.

    python bench/bench_quantize.py --json

Every row shows whether our bytes equal the plain-torch truth. The floor is the time to read what must be read and to
write what must be written, at the rates of torch's sum and fill of large tensors between the same rounds; what the
cache still holds, and stores that bypass it, may beat that. Quantizing returns new tensors: `ours` mostly gets pages
that the allocator has had before, `ours_fresh_pages` keeps every result, so that the system must hand out new ones,
`ours_in_place` allocates nothing. Dequantizing writes into a warm `out`, which bitsandbytes does not take on a CPU. It
and torchao are timed when they are importable, at what they offer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from cases import FLOAT_DTYPES, QUANT_TYPES
from ceilings import MemoryProbes, ceilings, floor
from common import Bar, Functions, add_json, interleaved, interleaved_sparing, line, machine, timings, write_json
from linear_contenders import torchao_weight

import qlora_native as qn
from qlora_native import _C, _native, reference

BLOCK_SIZE = 64
# Shape, type, double quantization: every combination on one shape, the usual one on an 8B model's MLP.
CASES = [((4096, 4096), kind, nested) for kind in QUANT_TYPES for nested in (True, False)]
CASES.append(((14336, 4096), "nf4", True))
QUANTIZE_BARS = (Bar("bitsandbytes", 50, faster=True),)  # bf16, NF4, double quantization
DEQUANTIZE_BARS = (Bar("copy", 1.1),)  # bf16


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


def quantize_in_place(t: torch.Tensor, w: qn.QuantizedWeight) -> Callable[[], None]:
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


def bitsandbytes_quantize(t: torch.Tensor, quant_type: str, nested: bool) -> tuple[Callable[[], Any], Any] | None:
    """Their quantize, and its result, or None."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return None

    def run() -> Any:
        return quantize_4bit(t, blocksize=BLOCK_SIZE, compress_statistics=nested, quant_type=quant_type)

    return run, run()


def keeping(function: Callable[[], Any]) -> Callable[[], None]:
    """The function, whose results stay alive."""
    kept: list[Any] = []
    return lambda: kept.append(function())


def jobs(t: torch.Tensor, w: qn.QuantizedWeight) -> tuple[Functions, Functions]:
    """What to time of t: quantizing to the kind of w, and dequantizing w."""
    out, other = torch.empty_like(t), t.clone()
    quantize: Functions = {
        "ours": lambda: qn.quantize(t, quant_type=w.quant_type, double_quant=w.double_quant),
        "ours_in_place": quantize_in_place(t, w),
        "copy": lambda: out.copy_(t),
    }
    dequantize: Functions = {
        "ours": lambda: w.dequantize(out=out),
        "copy": lambda: out.copy_(other),
        "fill": lambda: out.fill_(1.0),
    }
    if t.dtype != torch.bfloat16:
        return quantize, dequantize
    peer = bitsandbytes_quantize(t, w.quant_type, w.double_quant)
    if peer is not None:
        from bitsandbytes.functional import dequantize_4bit

        packed, state = peer[1]
        quantize["bitsandbytes"] = peer[0]
        dequantize["bitsandbytes"] = lambda: dequantize_4bit(packed, state)
    nf4 = torchao_weight(t) if w.quant_type == "nf4" and w.double_quant else None
    if nf4 is not None:
        quantize["torchao"] = lambda: torchao_weight(t)
        dequantize["torchao"] = nf4.get_original_weight
    return quantize, dequantize


def rows(
    shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """The row of each direction."""
    t = (torch.randn(shape) / shape[1] ** 0.5).to(dtype)
    w = qn.quantize(t, quant_type=quant_type, double_quant=nested)
    quantize, dequantize = jobs(t, w)
    matched = matches(t, w)
    quantize["ours_in_place"]()
    matched = matched and matches(t, w)
    decoded = same(dequantize["ours"](), reference.dequantize(dtype, *w.op_args()))
    usual = dtype == torch.bfloat16 and quant_type == "nf4" and nested

    found, probes = [], MemoryProbes()
    dense_bytes = t.numel() * t.itemsize
    for direction, functions, match in (("quantize", quantize, matched), ("dequantize", dequantize, decoded)):
        seconds = interleaved_sparing(functions | probes.jobs(), repeats)
        rates = probes.rates(seconds)
        row: dict[str, Any] = {"direction": direction, "n": shape[0], "k": shape[1], "quant_type": quant_type}
        row |= {"double_quant": nested, "dtype": str(dtype).removeprefix("torch."), "match": match}
        if direction == "quantize":
            seconds |= interleaved({"ours_fresh_pages": keeping(functions["ours"])}, 9, warmup=1)
            bars, moved = QUANTIZE_BARS if usual else (), (dense_bytes, w.nbytes)
        else:
            bars, moved = DEQUANTIZE_BARS if dtype == torch.bfloat16 else (), (w.nbytes, dense_bytes)
        row |= rates | timings(seconds, bars, floor(rates, *moved))
        row["ours_gb_per_s"] = round(sum(moved) / row["ms"]["ours"][1] / 1e6, 1)
        found.append(row)
    return found


def main() -> None:
    """Parse, run, print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--only-n", type=int, help="one N of the shapes")
    parser.add_argument("--dtypes", nargs="+", default=[str(d).removeprefix("torch.") for d in FLOAT_DTYPES])
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measured = ceilings(dots=False)
    result: dict[str, Any] = {"bench": "quantize", "machine": machine(), "ceilings": measured, "rows": []}
    print(json.dumps(result["machine"]), json.dumps(measured), sep="\n")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    for case, dtype in itertools.product(CASES, dtypes):
        if arguments.only_n in (None, case[0][0]):
            for row in rows(*case, dtype, arguments.repeats):
                result["rows"].append(row)
                print(line(row, "direction", "n", "k", "quant_type", "double_quant", "dtype"), flush=True)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
