"""``qlora convert``: a model folder between 16 bits, this library's 4 bits and bitsandbytes'."""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from qlora_native.cli.quantize import BLOCK_SIZES
from qlora_native.errors import UserError

TARGETS = ("16bit", "qlora", "bitsandbytes")
_QUANTIZING = ("quant_type", "block_size", "double_quant", "skip_modules")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments; those of quantizing as in ``qlora quantize``."""
    parser.add_argument("source", metavar="SRC", help="a model folder with safetensors: 32-bit, 16-bit, fp8 or 4-bit")
    parser.add_argument("out", metavar="DST", help="the folder to make; it must not exist yet")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what to make of it")
    add_quantizing(parser)
    add_shard_size(parser)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of what is not 4-bit, and of decoded weights (default: config.json's if that is 16-bit, else bfloat16)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = """16bit: plain weights; those that are 4-bit are decoded. bitsandbytes: 4-bit as bitsandbytes'
Linear4bit stores it, which transformers loads with bitsandbytes. qlora: the same tensors, which transformers loads with
this library. load_model reads both. Weights that are 4-bit already keep their bytes between the two.
Tensors are read and written a few megabytes at a time, so a model may be larger than memory.

examples:
  qlora convert Llama-3.1-8B-nf4 Llama-3.1-8B-decoded --to 16bit
  qlora convert Llama-3.1-8B Llama-3.1-8B-nf4 --to bitsandbytes --block-size 64"""


def add_quantizing(parser: argparse.ArgumentParser) -> None:
    """How to quantize what is not 4-bit yet; None is not given."""
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), help="the 16 levels (default: nf4)")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, metavar="N", help="weights per scale (default: 64)"
    )
    parser.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, help="store the scales in 8 bits (default: yes)"
    )
    parser.add_argument(
        "--skip-modules", nargs="+", metavar="NAME", help="linear layers to leave dense (default: lm_head)"
    )


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """How large a file of safetensors may be."""
    parser.add_argument("--shard-size", default="4GB", metavar="SIZE", help="largest file (default: 4GB)")


def quantizing(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that were given, as load_model takes them."""
    given: dict[str, Any] = {name: getattr(args, name) for name in _QUANTIZING if getattr(args, name) is not None}
    if "skip_modules" in given:
        given["skip_modules"] = tuple(given["skip_modules"])
    return given


def as_trained(args: argparse.Namespace, rounds: bool) -> dict[str, Any]:
    """The options that were given; for the others, what the config beside the adapter says of its run.

    Args:
        rounds: whether 16-bit weights are to become the 4-bit ones of that run, which rounding to nearest cannot do
            where they were calibrated: then UserError.
    """
    import torch

    from qlora_native.hf.source import open_source

    given = quantizing(args)
    config = Path(args.adapter).expanduser() / "config.yaml" if args.adapter else None
    if config is None or not config.is_file():
        return given
    import yaml

    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    told = settings.get("quant") or {}
    if open_source(Path(args.model).expanduser(), torch.bfloat16).four_bit_config:
        return given
    method = told.get("method", "rtn")
    if rounds and method != "rtn":
        from qlora_native.calibration.data import kept_calibration, quantize_command
        from qlora_native.hf.load import CALIBRATED

        kept = kept_calibration(Path(args.adapter).expanduser()) or told.get("calibration")
        text = kept or ("FILE" if method in CALIBRATED else None)
        dtype = (settings.get("train") or {}).get("dtype", "bfloat16")
        raise UserError(
            f"{args.adapter} was trained on weights made by {method}, and {args.model} is 16-bit: make them again with "
            f"`{quantize_command(args.model, told, dtype, text, 'DIR')}`, and give DIR in its place"
        )
    names = {"type": "quant_type", "block_size": "block_size", "double_quant": "double_quant"}
    return {name: told[key] for key, name in names.items() if key in told} | given


def refuse_existing(out: Path, name: str) -> None:
    """A folder or file that is there is never written over."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another {name} or remove it")


def run(args: argparse.Namespace) -> int:
    """Convert, whole or not at all."""
    import torch

    from qlora_native._io import as_user_error, as_write_error, atomic_folder
    from qlora_native.hf.convert import convert
    from qlora_native.hf.source import open_source

    logging.getLogger("transformers").setLevel(logging.ERROR)
    source, out = Path(args.source).expanduser(), Path(args.out).expanduser()
    refuse_existing(out, "DST")
    given = quantizing(args)
    four_bit = getattr(open_source(source, torch.bfloat16), "four_bit_config", None)
    if given and (args.to == "16bit" or four_bit):
        flag = f"--{next(iter(given)).replace('_', '-')}"
        why = "16bit has no 4-bit weights" if args.to == "16bit" else f"the weights of {source} are 4-bit already"
        raise UserError(f"qlora convert: {flag} says how to quantize, but {why}; leave it out")
    shard_bytes = shard_size(args)
    began = time.monotonic()
    with as_user_error(), as_write_error(out), atomic_folder(out) as partial:
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        report = convert(source, partial, args.to, dtype=dtype, shard_bytes=shard_bytes, **given)
    result = {"out": str(out), **vars(report), "seconds": round(time.monotonic() - began, 2)}
    if args.json:
        print(json.dumps(result))
        return 0
    done = {"quantized": report.quantized, "decoded": report.dequantized, "kept in 4 bits": report.copied}
    counts = ", ".join(f"{count} weights {command}" for command, count in done.items() if count) or "no 4-bit weights"
    print(
        f"{out}: {counts}; {report.num_bytes / 2**20:,.1f} MiB in {report.files} file{'s' * (report.files > 1)}; "
        f"took {result['seconds']:.1f} s"
    )
    return 0


def shard_size(args: argparse.Namespace) -> int:
    """Bytes of --shard-size."""
    text = args.shard_size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--shard-size is {text!r}: expected a size such as 500MB or 4GB")
    return int(float(match[1]) * _UNITS[match[2]])
