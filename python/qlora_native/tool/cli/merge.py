"""``qlora merge``: an adapter added to its base model, written as a model of its own, with what that cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qlora_native._io import as_user_error, as_write_error, atomic_folder, write_whole
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, refuse_existing, stopwatch
from qlora_native.tool.cli._weights import (
    add_base,
    add_quantizing,
    add_shard_size,
    as_trained,
    merge_base,
)

if TYPE_CHECKING:
    from qlora_native.models.merge_files import Merging
    from qlora_native.models.progress import Progress

REPORT = "merge_report"
METHODS = ("gptq", "rtn")


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("model", "MODEL", "the base: a model folder or a .gguf file")
    add("adapter", "ADAPTER", "a folder in PEFT's format, such as run/adapter")
    add("--out", "DIR", "the folder to make; it must not exist yet", required=True)
    add_base(parser)
    add("--to", ("bf16", "fp16", "fp32", "nf4"), "what to write (default: bf16)", default="bf16")
    methods = (
        "--to nf4: rtn rounds the sum to nearest, gptq hands on what rounding loses to later columns "
    )
    methods += "(default: gptq with --calibration, else rtn)"
    add("--method", METHODS, methods)
    text = "--to nf4: text such as the model will meet, any file that training reads"
    add("--calibration", "FILE", text)
    add_quantizing(parser)
    add_shard_size(parser)
    add("--check", None, "report the error of each weight and the logits' drift")
    sample = "--check: held-out rows, on which losses are compared too (default: a few sentences, for the logits alone)"
    add("--sample", "FILE", sample)
    add("--json", None, "print the result as one JSON object")
    parser.epilog = f"""Tensors are read, merged and written a few megabytes at a time, so the model may be larger than
memory; --check loads it. Its report goes to DIR/{REPORT}.json and DIR/{REPORT}.md.
The options of quantizing describe how MODEL was loaded for training; the default is the config.yaml beside the adapter.

examples:
  qlora merge Llama-3.1-8B-Instruct run/adapter --out merged
  qlora merge Llama-3.1-8B-Instruct run/adapter --out merged --check --sample heldout.jsonl
  qlora merge Llama-3.1-8B-Instruct run/adapter --out merged --base original"""


def run(args: argparse.Namespace) -> int:
    from qlora_native.calibration.data import CalibrationData
    from qlora_native.data.template import check_vocabulary
    from qlora_native.models.merge_files import Merging
    from qlora_native.models.progress import layer_progress
    from qlora_native.models.recode import calibrated_codes
    from qlora_native.tool.evaluate import check
    from qlora_native.weights.open import load_tokenizer

    out = args.out
    refuse_existing(out, "--out")
    if args.sample and not args.check:
        raise UserError(
            "qlora merge: --sample is for --check, which is not given; add --check or leave it out"
        )
    if args.to != "nf4" and (args.method or args.calibration):
        raise UserError(
            f"qlora merge: --method and --calibration are for --to nf4, and --to is {args.to}"
        )
    args.method = args.method or ("gptq" if args.calibration else "rtn")
    if (args.method == "gptq") != bool(args.calibration):
        raise UserError(
            "qlora merge: --method gptq and --calibration FILE, text such as the model will meet, go together; give "
            "both or neither"
        )
    with as_user_error():
        tokenizer = load_tokenizer(str(args.model)) if args.check else None
        rows = check.sample_rows(args.sample, tokenizer) if args.check else []
        seconds = stopwatch()
        args.base, base = merge_base(args)
        trained = as_trained(args) if args.check else base
        work = Merging(base.path, args.adapter, base=args.base, to=args.to, **base.options)
        if rows:
            check_vocabulary(
                max(map(max, rows)), tokenizer, work.meta.model, str(args.sample or "--check")
            )
        if args.method == "rtn":
            write_merged(work, out, args.shard_size)
        else:
            with as_write_error(out), layer_progress() as progress:
                out.parent.mkdir(parents=True, exist_ok=True)
                with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
                    if work.four_bit or work.rounded:
                        calibration = CalibrationData(args.calibration)
                        work.codes = calibrated_codes(
                            work, args.adapter, calibration, Path(name), progress
                        )
                        write_merged(work, out, args.shard_size)
                    else:
                        write_calibrated(work, args, base.options, Path(name), progress)
        result: dict[str, Any] = {
            **{name: str(getattr(args, name)) for name in ("out", "model", "adapter", "base", "to")},
            "layers": len(work.adapter.pairs),
            "files": work.report.files,
            "num_bytes": work.report.num_bytes,
            "seconds": seconds(),
        }
        if not args.json:
            size = f"{result['num_bytes'] / 2**20:,.1f} MiB in {args.to}"
            print(
                f"{out}: {result['layers']} layers merged, {size}; took {result['seconds']:.1f} s",
                flush=True,
            )
        if args.check:
            result["weights"] = check.check_weights(work, out)
            result["largest_drift"] = max(
                result["weights"], key=lambda row: row["error"], default=None
            )
            result["logits"] = check.check_logits(work, trained, out, rows)
            result["verdict"] = check.verdict(result)
            if args.sample:
                result["retention"] = check.check_retention(work, trained, out, args.sample, tokenizer)
            with as_write_error(out):
                write_whole(out / f"{REPORT}.json", json.dumps(result, indent=2) + "\n")
                write_whole(out / f"{REPORT}.md", check.report_markdown(result))
    if args.json:
        print(json.dumps(result))
    elif args.check:
        print(*_check_lines(result, out), sep="\n")
    return 0


def write_merged(work: Merging, out: Path, shard_bytes: int) -> None:
    """Write the folder of a merged model, with its tokenizer."""
    from qlora_native.weights.open import load_tokenizer

    # Beside safetensors the tokenizer is a file, which is copied with the others; that of an adapter takes its place.
    is_other = (
        work.adapter_folder is not None and (work.adapter_folder / "tokenizer_config.json").is_file()
    )
    is_other = is_other or work.source.path.suffix == ".gguf"
    tokenizer = load_tokenizer(work.source, work.adapter_folder) if is_other else None
    with as_write_error(out), atomic_folder(out) as partial:
        work.write(partial, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def write_calibrated(
    work: Merging, args: argparse.Namespace, given: dict[str, Any], folder: Path, progress: Progress
) -> None:
    """Write the sum as :func:`qlora_native.quantize_calibrated` rounds it; it lies in ``folder`` in 16 bits, and is
    read from there layer after layer."""
    from qlora_native.calibration.data import CalibrationData
    from qlora_native.models.load import load_model
    from qlora_native.models.merge_files import Merging
    from qlora_native.models.trained import store_model
    from qlora_native.weights.open import load_tokenizer

    tokenizer = load_tokenizer(str(args.model), args.adapter)
    write_merged(
        Merging(args.model, args.adapter, base=args.base, **given), folder / "sum", args.shard_size
    )
    calibration = CalibrationData(args.calibration, tokenizer=tokenizer)
    options = {
        **work.options,
        "skip_modules": work.skip_modules,
        "method": "gptq",
        "calibration": calibration,
    }
    store_model(
        load_model(folder / "sum", progress=progress, **options), args.out, tokenizer, args.shard_size
    )
    files = list(args.out.glob("*.safetensors"))
    work.report.files, work.report.num_bytes = len(files), sum(file.stat().st_size for file in files)


def _check_lines(result: dict[str, Any], out: Path) -> Iterator[str]:
    worst = result["largest_drift"]
    if worst is not None:
        lost = (
            "" if worst["lost"] is None else f", {worst['lost']:.2g} of what the adapter changes there"
        )
        yield f"largest error of a weight: {worst['layer']}, relative error {worst['error']:.2g}{lost}"
    for row in result["logits"]:
        yield (
            f"logits against {row['against']}: KL {row['kl_mean']:.2g} nats a token (largest {row['kl_max']:.2g}), "
            f"relative difference {row['relative']:.2g}, {100 * row['same_top']:.1f} % the same likeliest token"
        )
    if "retention" in result:
        from qlora_native.tool.evaluate.retention import describe

        yield describe(result["retention"])
    yield f"verdict: {result['verdict']}"
    yield f"report: {out / REPORT}.md and .json"
