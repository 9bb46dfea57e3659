"""``qlora eval``: measure what 4 bits and an adapter did to a model, on the user's own texts and lm-eval's tasks."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_native._io import as_user_error, as_write_error, reading, user_path
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import print_result, printable, require
from qlora_native.tool.cli._weights import DTYPES, announce_base, as_trained


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    several: dict[str, Any] = {"nargs": "+", "default": []}
    methods = "4-bit forms of a 16-bit model: rtn, wmse, gptq (default: rtn)"
    part = "predicted part of a conversation (default: answers)"
    for name, metavar, kind, text, options in (
        ("model", "MODEL", user_path, "a model folder, 16-bit or 4-bit, or a .gguf file", {}),
        ("--data", "FILE", user_path, "texts: any file that training reads, or .txt", several),
        ("--choices", None, str, argparse.SUPPRESS, {"nargs": "*"}),  # of older versions
        ("--columns", "KEY=COLUMN", str, "columns of the files, as data.columns (default: the adapter's)", several),
        ("--lm-eval", "TASK", str, "tasks of lm-eval, if it is installed", several),
        ("--adapter", "DIR", user_path, "an adapter, measured on the weights that it was trained on", {}),
        ("--shipped", "DIR", user_path, "a model that the adapter was merged into: what it keeps", {}),
        ("--compare", "METHOD", str, methods, several),
        ("--calibration", "FILE", user_path, "text for wmse and gptq; not one that is evaluated", {}),
        ("--reference", "DIR", user_path, "the 16-bit model that a 4-bit MODEL was made from", {}),
        ("--max-length", "N", int, "tokens a row (default: 1024)", {"default": 1024}),
        ("--rows", "N", int, "only the first N rows of each file or task", {}),
        ("--answers", "N", int, "print the answers to the first N rows of each file (default: 5 with --adapter)", {}),
        ("--train-on", None, str, part, {"choices": ("answers", "all"), "default": "answers"}),
        ("--dtype", None, str, "of activations and of what is not 4-bit (default: bfloat16)", {"choices": DTYPES}),
        ("--report", "DIR", user_path, "write report.md, report.json and report.png there", {}),
    ):
        parser.add_argument(name, metavar=metavar, type=kind, help=text, **options)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = """With --adapter base and tuned model are compared on the same rows: loss, perplexity, their
difference with its standard error, how many rows are answered exactly, and some answers of both.
A 16-bit MODEL is compared with its 4-bit forms: loss, perplexity, KL divergence from 16 bits,
each with its standard error over rows. One model is in memory at a time; of the 16-bit one, two bytes for each token
and element of its hidden state are kept in a temporary file.

examples:
  qlora eval Llama-3.1-8B --data heldout.jsonl --adapter run/adapter
  qlora eval Llama-3.1-8B --data heldout.jsonl notes.txt --compare rtn wmse gptq --calibration train.jsonl --report eval
  qlora eval Llama-3.1-8B --data heldout.jsonl --adapter run/adapter --shipped run/shipped
  qlora eval Llama-3.1-8B-nf4 --reference Llama-3.1-8B --lm-eval arc_easy"""


def run(args: argparse.Namespace) -> int:
    """Read, measure, report."""
    _check(args)
    import torch

    from qlora_native._memory import peak_rss_bytes
    from qlora_native.data.template import padding_id
    from qlora_native.tool.evaluate.comparison import compare
    from qlora_native.tool.evaluate.harness import check_harness
    from qlora_native.tool.evaluate.report import tables, write_report
    from qlora_native.tool.evaluate.texts import load_text
    from qlora_native.tool.evaluate.variants import Variants
    from qlora_native.weights.open import load_tokenizer

    if args.lm_eval:
        check_harness()
    options: dict[str, Any] = {"device": "cuda"} if torch.cuda.is_available() else {}
    if args.dtype is not None:
        options["dtype"] = getattr(torch, args.dtype)
    with as_user_error():
        trained = as_trained(args)
        announce_base(args, trained)
        variants = Variants(
            args.model,
            methods=list(dict.fromkeys(args.compare)),
            adapter=args.adapter,
            trained=trained if trained.options or trained.path != args.model else None,
            shipped=args.shipped,
            reference=args.reference,
            calibration=args.calibration,
            options=options,
        )
        tokenizer = load_tokenizer(str(variants.model), args.adapter)
        limits = {"max_length": args.max_length, "limit": args.rows, "columns": _columns(args)}
        texts = [load_text(path, tokenizer, train_on=args.train_on, **limits) for path in args.data]

        def note(line: str) -> None:
            if not args.json:
                print(line, flush=True)

        for text in texts:
            note(text.about)
        pad_id = padding_id(tokenizer)
        count = args.answers if args.answers is not None else 5 if args.adapter else 0
        limits = {"limit": args.rows, "answered": count}
        result = compare(variants, texts, tokenizer, pad_id=pad_id, tasks=args.lm_eval, note=note, **limits)
    if args.report:
        settings = {"calibration": args.calibration, "adapter": args.adapter, "shipped": args.shipped}
        settings["16-bit reference"] = args.reference
        about = [f"{name}: {value}" for name, value in settings.items() if value is not None]
        with as_write_error(args.report):
            drawn = write_report(result, args.report, [*(text.about for text in texts), *about])
        note(f"report: {args.report}" + ("" if drawn else " (without report.png: pip install matplotlib draws it)"))
    peak = peak_rss_bytes()
    hashes = {text.name: text.sha256 for text in texts}
    lines = ["", *map(printable, tables(result)), "", f"peak memory {peak / 2**20:,.0f} MiB"]
    print_result(args, {**result.as_dict(), "sha256": hashes, "peak_rss_bytes": peak}, lines)
    return 0


def _columns(args: argparse.Namespace) -> dict[str, str]:
    """``data.columns``: as given, or of the run that made the adapter."""
    words = ["--columns", *args.columns] if args.columns else []
    file = args.adapter / "config.yaml" if args.adapter else None
    if not words and not (file and file.is_file()):
        return {}
    require("qlora eval --columns", "pydantic")
    from qlora_native.tool.config import TrainConfig, read_yaml

    data: dict[str, Any] = {"train": "rows.jsonl"}
    if file is not None and file.is_file() and not words:
        with reading(file, "expected the config of the adapter's run, or none"):
            data["columns"] = dict((read_yaml(file)[0].get("data") or {}).get("columns") or {})
    return TrainConfig.from_values({"model": str(args.model), "data": data}, words).data.columns


def _check(args: argparse.Namespace) -> None:
    """UserError for arguments that are wrong by themselves."""
    if args.choices is not None:
        raise UserError("qlora eval: --choices is gone: --lm-eval TASK measures multiple choice, also on your own rows")
    if not (args.data or args.lm_eval):
        raise UserError("qlora eval: nothing to evaluate on; give --data FILE or --lm-eval TASK (or both)")
    if args.max_length < 2:
        raise UserError(f"qlora eval: --max-length is {args.max_length}: expected 2 or more")
    if args.rows is not None and args.rows < 1:
        raise UserError(f"qlora eval: --rows is {args.rows}: expected 1 or more")
    if args.answers is not None and args.answers < 0:
        raise UserError(f"qlora eval: --answers is {args.answers}: expected 0 or more")
    names = [file.name for file in args.data]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"qlora eval: two files are called {twice}, which the report cannot distinguish; rename one")
    if args.calibration is not None and args.calibration.resolve() in {file.resolve() for file in args.data}:
        raise UserError(
            f"qlora eval: {args.calibration} is evaluated and calibrated on, which flatters the result; "
            "give another file to --calibration"
        )
