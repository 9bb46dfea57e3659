"""``qlora convert``: a model folder between 16 bits, this library's 4 bits and bitsandbytes'."""

from __future__ import annotations

import argparse

from qlora_native._io import as_user_error, as_write_error, atomic_folder
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, print_result, refuse_existing, stopwatch
from qlora_native.tool.cli._weights import (
    DTYPE_NAMES,
    add_quantizing,
    add_shard_size,
    has_four_bit_config,
    quantizing,
)

TARGETS = ("16bit", "qlora", "bitsandbytes")


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("source", "SRC", "a model folder with safetensors: 32-bit, 16-bit, fp8 or 4-bit")
    add("out", "DST", "the folder to make; it must not exist yet")
    add("--to", TARGETS, "what to make of it", required=True)
    add_quantizing(parser, keeps=False)
    add_shard_size(parser)
    dtype = "of what is not 4-bit, and of decoded weights (default: config.json's if that is 16-bit, else bfloat16)"
    add("--dtype", DTYPE_NAMES, dtype)
    add("--json", None, "print the result as one JSON object")
    parser.epilog = """16bit: plain weights; those that are 4-bit are decoded. bitsandbytes: 4-bit as bitsandbytes'
Linear4bit stores it, which transformers loads with bitsandbytes. qlora: the same tensors, which transformers loads with
this library. load_model reads both. Weights that are 4-bit already keep their bytes between the two.
Tensors are read and written a few megabytes at a time, so a model may be larger than memory.

examples:
  qlora convert Llama-3.1-8B-nf4 Llama-3.1-8B-decoded --to 16bit
  qlora convert Llama-3.1-8B Llama-3.1-8B-nf4 --to bitsandbytes --block-size 64"""


def run(args: argparse.Namespace) -> int:
    import torch

    from qlora_native.models.convert import convert

    out, given, is_dense = args.out, quantizing(args), args.to == "16bit"
    refuse_existing(out, "DST")
    has_four_bit = has_four_bit_config(args.source)
    if given and (is_dense or has_four_bit):
        flag = f"--{min(given).replace('_', '-')}"
        why = (
            "16bit has no 4-bit weights"
            if is_dense
            else f"the weights of {args.source} are 4-bit already"
        )
        raise UserError(f"qlora convert: {flag} says how to quantize, but {why}; leave it out")
    seconds = stopwatch()
    with as_user_error(), as_write_error(out), atomic_folder(out) as partial:
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        report = convert(
            args.source, partial, args.to, dtype=dtype, shard_bytes=args.shard_size, **given
        )
    result = {"out": str(out), **vars(report), "seconds": seconds()}
    done = {
        "quantized": report.quantized,
        "decoded": report.dequantized,
        "kept in 4 bits": report.copied,
    }
    counts = (
        ", ".join(f"{count} weights {what}" for what, count in done.items() if count)
        or "no 4-bit weights"
    )
    size = f"{report.num_bytes / 2**20:,.1f} MiB in {report.files} file{'s' * (report.files > 1)}"
    print_result(args, result, [f"{out}: {counts}; {size}; took {result['seconds']:.1f} s"])
    return 0
