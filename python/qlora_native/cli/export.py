"""``qlora export``: a model, or a model and an adapter, in the form that another program reads."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from qlora_native.cli.convert import add_quantizing, add_shard_size, as_trained, refuse_existing, shard_size
from qlora_native.cli.main import missing_modules
from qlora_native.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("model", metavar="MODEL", help="a model folder or a .gguf file")
    parser.add_argument("--adapter", metavar="DIR", help="a folder in PEFT's format, or a checkpoint of a run")
    parser.add_argument("--to", required=True, choices=("safetensors", "gguf", "peft"), help="what to make")
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder or .gguf file; it must not exist yet")
    parser.add_argument(
        "--type",
        choices=("f16", "bf16", "q8_0", "f32"),
        help="of the matrices; safetensors takes all but q8_0 (default: bf16, for gguf f16)",
    )
    parser.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="original",
        help="add the adapter to the weights in MODEL, or to their 4-bit form (default: original)",
    )
    add_quantizing(parser)
    add_shard_size(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = """safetensors: a 16-bit folder that transformers loads. gguf: one file with the tokenizer and chat
template in it, which llama.cpp runs: llama, mistral, qwen2, qwen3, gemma and gemma2. peft: the adapter alone, checked
against MODEL, which it then names as its base. Tensors are read and written a few megabytes at a time.

examples:
  qlora export Llama-3.1-8B-Instruct --adapter run/adapter --to gguf --type q8_0 --out tuned.gguf
  qlora export Llama-3.1-8B-Instruct --adapter run/adapter --to safetensors --out tuned
  qlora export Llama-3.1-8B-Instruct --adapter run/step-000200 --to peft --out tuned-adapter"""


def run(args: argparse.Namespace) -> int:
    """Export, whole or not at all."""
    from qlora_native._io import as_user_error

    logging.getLogger("transformers").setLevel(logging.ERROR)
    out = Path(args.out).expanduser()
    refuse_existing(out, "--out")
    began = time.monotonic()
    with as_user_error():
        result = {"gguf": _gguf, "safetensors": _safetensors, "peft": _peft}[args.to](args, out)
    result = {"out": str(out), "to": args.to, **result, "seconds": round(time.monotonic() - began, 2)}
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{out}: {result['num_bytes'] / 2**20:,.1f} MiB; took {result['seconds']:.1f} s")
    if result.get("not_q8_0"):
        print(f"{len(result['not_q8_0'])} matrices are F16, as their rows are no multiple of 32 long")
    return 0


def _merging(args: argparse.Namespace, to: str) -> Any:
    from qlora_native.hf.merge import Merging

    adapter = Path(args.adapter).expanduser() if args.adapter else None
    if args.base == "original" and adapter is None and _is_four_bit(args.model):
        args.base = "dequantized"  # nothing is added to it, so there is nothing to choose
    return Merging(
        Path(args.model).expanduser(), adapter, base=args.base, to=to, **as_trained(args, args.base == "dequantized")
    )


def _is_four_bit(model: str) -> bool:
    import torch

    from qlora_native.hf.source import open_source

    return bool(open_source(Path(model).expanduser(), torch.bfloat16).four_bit_config)


def _safetensors(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from qlora_native._io import as_write_error, atomic_folder
    from qlora_native.hf.merge import merge_files
    from qlora_native.hf.source import GgufSource, load_tokenizer

    types = {"f16": "fp16", "bf16": "bf16", "f32": "fp32", None: "bf16"}
    if args.type not in types:
        raise UserError(f"qlora export: --type {args.type} is of GGUF: expected f16, bf16 or f32 with --to safetensors")
    shard_bytes, work = shard_size(args), _merging(args, types[args.type])
    tokenizer = load_tokenizer(args.model) if isinstance(work.source, GgufSource) else None
    with as_write_error(out), atomic_folder(out) as partial:
        merge_files(work, partial, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return {"files": work.report.files, "num_bytes": work.report.num_bytes}


def _gguf(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    if missing_modules(("gguf",)):
        raise UserError("qlora export --to gguf needs gguf, which is not installed: pip install 'qlora_native[train]'")
    from qlora_native._io import PARTIAL, as_write_error, fsync
    from qlora_native.export.gguf import export_gguf
    from qlora_native.hf.source import GgufSource, load_tokenizer

    if out.suffix != ".gguf":
        raise UserError(f"qlora export: --out is {out}: expected a name that ends in .gguf")
    work = _merging(args, "fp32")
    tokenizer = None if isinstance(work.source, GgufSource) else load_tokenizer(args.model)
    partial = out.with_name(f".{out.name}{PARTIAL}")
    try:
        with as_write_error(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            result = export_gguf(work, partial, args.type or "f16", tokenizer)
            fsync(partial)
            os.rename(partial, out)
            fsync(out.parent)
    finally:
        partial.unlink(missing_ok=True)
    return result


def _peft(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from qlora_native._io import as_write_error, atomic_folder
    from qlora_native.lora.adapter import CONFIG_NAME, TENSORS_NAME

    if args.adapter is None or args.type is not None:
        raise UserError("qlora export: --to peft takes --adapter DIR, and no --type: the adapter is written as it is")
    adapter = Path(args.adapter).expanduser()
    args.base = "dequantized" if _is_four_bit(args.model) else "original"
    _merging(args, "fp32")  # refuses what does not belong together
    config = json.loads((adapter / CONFIG_NAME).read_bytes())
    config["base_model_name_or_path"] = str(Path(args.model).expanduser())
    with as_write_error(out), atomic_folder(out) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in (adapter / TENSORS_NAME, adapter / "README.md"):
            if path.is_file():
                (partial / path.name).write_bytes(path.read_bytes())
    return {"num_bytes": (out / TENSORS_NAME).stat().st_size}
