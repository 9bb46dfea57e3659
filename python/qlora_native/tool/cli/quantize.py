"""``qlora quantize``: a 16-bit model folder becomes a 4-bit one that bitsandbytes and this library load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from qlora_native._io import as_user_error, as_write_error, atomic_folder, user_path
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import print_result, refuse_existing, stopwatch
from qlora_native.tool.cli._weights import DTYPES, add_quantizing, add_shard_size, is_four_bit, quantizing
from qlora_native.weight import CALIBRATED

FELL_BACK_LINES = 8
WORK = ".qlora-calibration"  # suffix of the hidden folder beside DIR from which an interrupted run goes on


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=user_path, metavar="MODEL", help="a 16-bit model folder or a .gguf file")
    add("--out", type=user_path, required=True, metavar="DIR", help="the folder to make; it must not exist yet")
    add_quantizing(parser, keeps=False)
    dtype = "of what stays unquantized, and of the decoded weights (default: bfloat16)"
    add("--dtype", choices=DTYPES, default="bfloat16", help=dtype)
    method = "how codes and scales are chosen (default: wmse with --calibration, else rtn, which rounds to nearest)"
    add("--method", choices=("rtn", "wmse", "gptq"), help=method)
    add("--calibration", metavar="FILE", help="text for wmse and gptq: a file that qlora train reads (.jsonl, ...)")
    add("--calibration-format", metavar="NAME", help="of its rows, such as text or messages (default: detected)")
    add("--calibration-rows", type=int, metavar="N", help="sequences taken of it (default: 16 for wmse, 128 for gptq)")
    add("--calibration-length", type=int, metavar="N", help="tokens of each (default: 512)")
    add("--seed", type=int, default=0, help="of the order in which its rows are sampled (default: 0)")
    add_shard_size(parser)
    add("--json", action="store_true", help="print the result as one JSON object")
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

    from qlora_native.models.load import load_model
    from qlora_native.models.progress import layer_progress
    from qlora_native.weights.files import aligned_files
    from qlora_native.weights.open import load_tokenizer

    source = args.model
    out = args.out
    refuse_existing(out, "--out")
    if is_four_bit(source):
        raise UserError(f"{source} is 4-bit already; give the 16-bit model it was made from")
    calibration = _calibration(args)
    seconds = stopwatch()
    with as_user_error(), layer_progress() as progress:
        model: Any = load_model(
            source,
            dtype=getattr(torch, args.dtype),
            method=args.method,
            calibration=calibration,
            work_dir=None if calibration is None else out.with_name(f".{out.name}{WORK}"),
            progress=progress,
            **{"quant_type": "nf4"} | quantizing(args),
        )
    tokenizer = None
    note = ""
    try:
        tokenizer = load_tokenizer(str(source))
    except UserError as error:
        note = f"no tokenizer is written: {error}"
    with as_write_error(out), atomic_folder(out) as partial:
        with aligned_files():
            model.save_pretrained(partial, max_shard_size=args.shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
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


def _calibration(args: argparse.Namespace) -> Any:
    from qlora_native.calibration.data import CalibrationData

    given = {"rows": args.calibration_rows, "length": args.calibration_length, "format": args.calibration_format}
    if args.calibration is not None:
        return CalibrationData(args.calibration, seed=args.seed, **given)
    flags = [f"--calibration-{name}" for name, value in given.items() if value is not None]
    if args.method in CALIBRATED or flags:
        flag = flags[0] if flags else f"--method {args.method}"
        raise UserError(f"qlora quantize: {flag} needs --calibration FILE, text such as the model will meet")
    return None


def _lines(result: dict[str, Any], dtype: str, note: str) -> Iterator[str]:
    quantized, dense, on_disk = (result[f"bytes_{name}"] / 2**20 for name in ("4bit", "dense", "on_disk"))
    yield (
        f"{result['out']}: {quantized:,.1f} MiB in 4 bits, {dense:,.1f} MiB in {dtype}, {on_disk:,.1f} MiB on disk; "
        f"took {result['seconds']:.1f} s"
    )
    method = result["method"]
    fell_back = result["fell_back"]
    if result["calibration"] is not None:
        yield f"method {method}, calibrated with {result['calibration']['tokens']:,} tokens"
    yield from (f"not by {method}: {name}: {why}" for name, why in list(fell_back.items())[:FELL_BACK_LINES])
    if len(fell_back) > FELL_BACK_LINES:
        yield f"and {len(fell_back) - FELL_BACK_LINES} more weights; --json lists them"
    if note:
        yield note
