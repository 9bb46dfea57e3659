"""``qlora merge``: an adapter added to its base model, written as a model of its own, with what that cost."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from qlora_native.cli.convert import add_quantizing, add_shard_size, as_trained, shard_size
from qlora_native.errors import UserError

REPORT = "merge_report"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments; those of quantizing as in ``qlora quantize``."""
    parser.add_argument("model", metavar="MODEL", help="the base: a model folder or a .gguf file")
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder in PEFT's format, such as run/adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make; it must not exist yet")
    parser.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="original",
        help="add the adapter to the weights in MODEL, or to their 4-bit form, on which it was trained "
        "(default: original)",
    )
    parser.add_argument(
        "--to", choices=("bf16", "fp16", "fp32", "nf4"), default="bf16", help="what to write (default: bf16)"
    )
    add_quantizing(parser)
    add_shard_size(parser)
    parser.add_argument("--check", action="store_true", help="report the error of each weight and the logits' drift")
    parser.add_argument(
        "--sample", metavar="FILE", help="--check: a text or data file to compare logits on (default: a few sentences)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = f"""Tensors are read, merged and written a few megabytes at a time, so the model may be larger than
memory; --check loads it. Its report goes to DIR/{REPORT}.json and DIR/{REPORT}.md.
The options of quantizing say how MODEL was loaded for training; without them, the config.yaml beside the adapter does.

examples:
  qlora merge Llama-3.1-8B-Instruct run/adapter --out merged
  qlora merge Llama-3.1-8B-Instruct run/adapter --out merged --base dequantized --check --sample heldout.jsonl"""


def run(args: argparse.Namespace) -> int:
    """Merge, whole or not at all; then check."""
    from qlora_native._io import as_user_error, as_write_error, atomic_folder
    from qlora_native.cli.convert import refuse_existing
    from qlora_native.export.check import check_logits, check_weights, report_markdown, sample_rows
    from qlora_native.hf.merge import Merging, merge_files
    from qlora_native.hf.source import SafetensorsSource, load_tokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    source, adapter, out = (Path(name).expanduser() for name in (args.model, args.adapter, args.out))
    refuse_existing(out, "--out")
    if args.sample and not args.check:
        raise UserError("qlora merge: --sample is for --check, which is not given; add --check or leave it out")
    tokenizer: Any = None
    rows: list[list[int]] = []
    if args.check or source.is_file():
        tokenizer = load_tokenizer(args.model)
    with as_user_error():
        if args.check:
            rows = sample_rows(Path(args.sample).expanduser() if args.sample else None, tokenizer)
        began = time.monotonic()
        shard_bytes = shard_size(args)
        work = Merging(
            source, adapter, base=args.base, to=args.to, **as_trained(args, args.base == "dequantized" or args.check)
        )
        with as_write_error(out), atomic_folder(out) as partial:
            merge_files(work, partial, shard_bytes)
            if not isinstance(work.source, SafetensorsSource):
                tokenizer.save_pretrained(partial)
        result: dict[str, Any] = {
            "out": str(out),
            "model": str(source),
            "adapter": str(adapter),
            "base": args.base,
            "to": args.to,
            "layers": len(work.adapter.pairs),
            "files": work.report.files,
            "num_bytes": work.report.num_bytes,
            "seconds": round(time.monotonic() - began, 2),
        }
        if not args.json:
            print(
                f"{out}: {result['layers']} layers merged, {work.report.num_bytes / 2**20:,.1f} MiB in {args.to}; "
                f"took {result['seconds']:.1f} s",
                flush=True,
            )
        if args.check:
            result["weights"] = check_weights(work, out)
            result["largest_drift"] = max(result["weights"], key=lambda row: row["error"], default=None)
            result["logits"] = check_logits(work, out, rows)
            with as_write_error(out):
                (out / f"{REPORT}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                (out / f"{REPORT}.md").write_text(report_markdown(result), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    elif args.check:
        _tell(result, out)
    return 0


def _tell(result: dict[str, Any], out: Path) -> None:
    worst = result["largest_drift"]
    if worst is not None:
        lost = "" if worst["lost"] is None else f", {worst['lost']:.2g} of what the adapter changes there"
        print(f"largest drift: {worst['layer']}, relative error {worst['error']:.2g}{lost}")
    for row in result["logits"]:
        print(
            f"logits against {row['against']}: KL {row['kl_mean']:.2g} nats a token (largest {row['kl_max']:.2g}), "
            f"relative difference {row['relative']:.2g}, {100 * row['same_top']:.1f} % the same likeliest token"
        )
    print(f"report: {out / REPORT}.md and .json")
