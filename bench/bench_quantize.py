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

import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from cases import FLOAT_DTYPES, QUANT_TYPES
from ceilings import MemoryProbes, ceilings, floor
from common import Bar, Bench, Functions, interleaved, interleaved_sparing, timings
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
    absmax = w.absmax if w.nested_absmax is None else block_max
    quant_type = QUANT_TYPES.index(w.quant_type)
    of_blocks = (t.data_ptr(), _native.DTYPE_NUMBER[t.dtype], t.numel(), BLOCK_SIZE, quant_type)

    def run() -> None:
        _C.quantize_4bit(*of_blocks, w.packed.data_ptr(), absmax.data_ptr())
        if w.nested_absmax is not None and w.nested_offset is not None:
            targets = (part.data_ptr() for part in (w.absmax, w.nested_absmax, w.nested_offset))
            _C.quantize_scales(absmax.data_ptr(), absmax.numel(), *targets)

    return run


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
    with suppress(ImportError):
        from bitsandbytes import functional

        options: dict[str, Any] = {
            "blocksize": BLOCK_SIZE,
            "compress_statistics": w.double_quant,
            "quant_type": w.quant_type,
        }
        quantize["bitsandbytes"] = partial(functional.quantize_4bit, t, **options)
        dequantize["bitsandbytes"] = partial(functional.dequantize_4bit, *quantize["bitsandbytes"]())
    nf4 = torchao_weight(t) if w.quant_type == "nf4" and w.double_quant else None
    if nf4 is not None:
        quantize["torchao"] = lambda: torchao_weight(t)
        dequantize["torchao"] = nf4.get_original_weight
    return quantize, dequantize


def rows(
    shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
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
    bench = Bench("quantize", __doc__, repeats=31, n=(4096, 14336))
    bench.begin(ceilings=ceilings(dots=False))
    for case, dtype in itertools.product(CASES, FLOAT_DTYPES):
        for row in rows(*case, dtype, bench.options.repeats) if case[0][0] in bench.options.n else ():
            bench.add(row, "direction", "n", "k", "quant_type", "double_quant", "dtype")
    bench.write()


if __name__ == "__main__":
    main()
