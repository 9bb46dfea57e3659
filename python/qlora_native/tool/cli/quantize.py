"""``qlora quantize``: a 16-bit model folder becomes a 4-bit one that bitsandbytes and this library load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from qlora_native._io import as_user_error
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, print_result, refuse_existing, stopwatch
from qlora_native.tool.cli._weights import (
    DTYPE_NAMES,
    add_quantizing,
    add_shard_size,
    has_four_bit_config,
    quantizing,
)
from qlora_native.weight import CALIBRATED

FELL_BACK_LINES = 8
WORK = ".qlora-calibration"  # suffix of the hidden folder beside DIR from which an interrupted run goes on


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("model", "MODEL", "a 16-bit model folder or a .gguf file")
    add("--out", "DIR", "the folder to make; it must not exist yet", required=True)
    add_quantizing(parser, keeps=False)
    dtype = "of what stays unquantized, and of the decoded weights (default: bfloat16)"
    add("--dtype", DTYPE_NAMES, dtype, default="bfloat16")
    method = "how codes and scales are chosen (default: wmse with --calibration, else rtn, which rounds to nearest)"
    add("--method", ("rtn", "wmse", "gptq"), method)
    add("--calibration", "FILE", "text for wmse and gptq: a file that qlora train reads (.jsonl, ...)")
    add("--calibration-format", "NAME", "of its rows, such as text or messages (default: detected)")
    add("--calibration-rows", "N", "sequences taken of it (default: 16 for wmse, 128 for gptq)")
    add("--calibration-length", "N", "tokens of each (default: 512)")
    add("--seed", "N", "of the order in which its rows are sampled (default: 0)", default=0)
    add_shard_size(parser)
    add("--json", None, "print the result as one JSON object")
    parser.epilog = """It writes config.json with a quantization_config, model.safetensors (in shards if it is large)
in the format of bitsandbytes' Linear4bit, the generation defaults and the tokenizer. transformers loads the folder
where bitsandbytes is installed; this library loads it without. Tensors are read and quantized one at a time, with
--calibration one decoder layer at a time; a run with --calibration that was interrupted goes on after its last finished
layer when it is started again with the same options.

examples:
  qlora quantize Llama-3.1-8B-Instruct --out Llama-3.1-8B-Instruct-nf4
  qlora quantize Llama-3.1-8B-Instruct --calibration train.jsonl --method gptq --out Llama-3.1-8B-Instruct-gptq"""


def run(args: argparse.Namespace) -> int:
    import torch

    from qlora_native.calibration.data import CalibrationData
    from qlora_native.models.load import load_model
    from qlora_native.models.progress import layer_progress
    from qlora_native.models.trained import store_model
    from qlora_native.weights.open import load_tokenizer

    out = args.out
    refuse_existing(out, "--out")
    if has_four_bit_config(args.model):
        raise UserError(f"{args.model} is 4-bit already; give the 16-bit model it was made from")
    given = {name: getattr(args, f"calibration_{name}") for name in ("rows", "length", "format")}
    flags = [f"--calibration-{name}" for name, value in given.items() if value is not None]
    options: dict[str, Any] = {"quant_type": "nf4", "method": args.method, **quantizing(args)}
    if args.calibration is not None:
        options["calibration"] = CalibrationData(args.calibration, seed=args.seed, **given)
        options["work_dir"] = out.with_name(f".{out.name}{WORK}")
    elif args.method in CALIBRATED or flags:
        what = flags[0] if flags else f"--method {args.method}"
        raise UserError(
            f"qlora quantize: {what} needs --calibration FILE, text such as the model will meet"
        )
    seconds = stopwatch()
    with as_user_error(), layer_progress() as progress:
        model: Any = load_model(
            args.model, dtype=getattr(torch, args.dtype), progress=progress, **options
        )
    tokenizer: Any = None
    note = ""
    try:
        tokenizer = load_tokenizer(str(args.model))
    except UserError as error:
        note = f"no tokenizer is written: {error}"
    store_model(model, out, tokenizer, args.shard_size)
    report = model.load_report
    result = {
        "out": str(out),
        "bytes_4bit": report.bytes_4bit,
        "bytes_dense": report.bytes_dense,
        "bytes_on_disk": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": seconds(),
        "tokenizer": tokenizer is not None,
        "method": report.method,
        "calibration": report.calibration,
        "fell_back": report.fell_back,
    }
    print_result(args, result, _lines(result, args.dtype, note))
    return 0


def _lines(result: dict[str, Any], dtype: str, note: str) -> Iterator[str]:
    quantized, dense, on_disk = (
        result[f"bytes_{name}"] / 2**20 for name in ("4bit", "dense", "on_disk")
    )
    sizes = f"{quantized:,.1f} MiB in 4 bits, {dense:,.1f} MiB in {dtype}, {on_disk:,.1f} MiB on disk"
    yield f"{result['out']}: {sizes}; took {result['seconds']:.1f} s"
    if result["calibration"] is not None:
        yield f"method {result['method']}, calibrated with {result['calibration']['tokens']:,} tokens"
    others = [f"not by {result['method']}: {name}: {why}" for name, why in result["fell_back"].items()]
    yield from others[:FELL_BACK_LINES]
    if len(others) > FELL_BACK_LINES:
        yield f"and {len(others) - FELL_BACK_LINES} more weights; --json lists them"
    if note:
        yield note
