"""``qlora quantize``: a 16-bit model folder becomes a 4-bit one that bitsandbytes and this library load."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from qlora_native.errors import UserError

FELL_BACK_LINES = 8
WORK = ".qlora-calibration"  # suffix of the hidden folder beside DIR that an interrupted run goes on from
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments, as load_model takes them."""
    parser.add_argument("model", metavar="MODEL", help="a 16-bit model folder or a .gguf file")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make; it must not exist yet")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4", help="the 16 levels (default: nf4)")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=64, metavar="N", help="weights per scale (default: 64)"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store the scales in 8 bits (default: yes)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of what stays unquantized, and of the decoded weights (default: bfloat16)",
    )
    parser.add_argument(
        "--skip-modules",
        nargs="+",
        default=["lm_head"],
        metavar="NAME",
        help="linear layers to leave in --dtype (default: lm_head, the output embedding)",
    )
    parser.add_argument(
        "--method",
        choices=("rtn", "rtn_signed", "wmse", "gptq"),
        help="how codes and scales are chosen (default: wmse with --calibration, else rtn, which rounds to nearest)",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text for wmse and gptq: a file that qlora train reads (.jsonl, ...)"
    )
    parser.add_argument(
        "--calibration-format", metavar="NAME", help="of its rows, such as text or messages (default: found out)"
    )
    parser.add_argument(
        "--calibration-rows", type=int, metavar="N", help="sequences taken of it (default: 16 for wmse, 128 for gptq)"
    )
    parser.add_argument("--calibration-length", type=int, metavar="N", help="tokens of each (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which its rows are drawn (default: 0)")
    parser.add_argument("--shard-size", default="4GB", metavar="SIZE", help="largest file (default: 4GB)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = """It writes config.json with a quantization_config, model.safetensors (in shards if it is large)
    in the format of
bitsandbytes' Linear4bit, the generation defaults and the tokenizer. transformers loads the folder where bitsandbytes is
installed; this library loads it without. Tensors are read and quantized one at a time, with --calibration one decoder
layer at a time; a run with --calibration that was interrupted goes on after its last finished layer when it is started
again with the same options.

examples:
  qlora quantize Llama-3.1-8B-Instruct --out Llama-3.1-8B-Instruct-nf4
  qlora quantize Llama-3.1-8B-Instruct --calibration train.jsonl --method gptq --out Llama-3.1-8B-Instruct-gptq"""


def run(args: argparse.Namespace) -> int:
    """Load, which quantizes, and write."""
    import torch

    from qlora_native._io import as_user_error, as_write_error, atomic_folder
    from qlora_native.hf.load import load_model
    from qlora_native.hf.progress import LayerProgress
    from qlora_native.hf.source import load_tokenizer, open_source

    logging.getLogger("transformers").setLevel(logging.ERROR)
    source, out = Path(args.model).expanduser(), Path(args.out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it")
    if getattr(open_source(source, torch.bfloat16), "four_bit_config", None):
        raise UserError(f"{source} is 4-bit already; give the 16-bit model it was made from")
    calibration = _calibration(args)
    work = out.with_name(f".{out.name}{WORK}") if calibration is not None else None
    began = time.monotonic()
    with as_user_error(), LayerProgress() as progress:
        model = load_model(
            source,
            quant_type=args.quant_type,
            block_size=args.block_size,
            double_quant=args.double_quant,
            dtype=getattr(torch, args.dtype),
            skip_modules=args.skip_modules,
            method=args.method,
            calibration=calibration,
            work_dir=work,
            progress=progress,
        )
    tokenizer: Any = None
    try:
        tokenizer = load_tokenizer(str(source))
    except UserError as error:
        note = f"no tokenizer is written: {error}"
    with as_write_error(out), atomic_folder(out) as partial:
        model.save_pretrained(partial, max_shard_size=args.shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    report: Any = model.load_report
    result = {
        "out": str(out),
        "bytes_4bit": report.bytes_4bit,
        "bytes_dense": report.bytes_dense,
        "bytes_on_disk": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": round(time.monotonic() - began, 2),
        "tokenizer": tokenizer is not None,
        "method": report.method,
        "calibration": report.calibration,
        "fell_back": report.fell_back,
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"{out}: {report.bytes_4bit / 2**20:,.1f} MiB in 4 bits, "
        f"{report.bytes_dense / 2**20:,.1f} MiB in {args.dtype}, "
        f"{result['bytes_on_disk'] / 2**20:,.1f} MiB on disk; took {result['seconds']:.1f} s"
    )
    if report.calibration is not None:
        print(f"method {report.method}, calibrated with {report.calibration['tokens']:,} tokens")
    for name, why in list(report.fell_back.items())[:FELL_BACK_LINES]:
        print(f"not by {report.method}: {name}: {why}")
    if len(report.fell_back) > FELL_BACK_LINES:
        print(f"and {len(report.fell_back) - FELL_BACK_LINES} more weights; --json lists them")
    if tokenizer is None:
        print(note)
    return 0


def _calibration(args: argparse.Namespace) -> Any:
    from qlora_native.calibration.data import CalibrationData
    from qlora_native.hf.load import CALIBRATED

    given = {"rows": args.calibration_rows, "length": args.calibration_length, "format": args.calibration_format}
    if args.calibration is not None:
        return CalibrationData(args.calibration, seed=args.seed, **given)
    flags = [f"--calibration-{name}" for name, value in given.items() if value is not None]
    if args.method in CALIBRATED or flags:
        flag = f"--method {args.method}" if not flags else flags[0]
        raise UserError(f"qlora quantize: {flag} needs --calibration FILE, text such as the model will meet")
    return None
