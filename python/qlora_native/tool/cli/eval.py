"""``qlora eval``: measure what 4 bits and an adapter did to a model, on the user's own texts and lm-eval's tasks."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from qlora_native._io import as_user_error, as_write_error
from qlora_native.errors import UserError
from qlora_native.tool import card_dtype
from qlora_native.tool.cli._run import add_to, print_result, printable, require
from qlora_native.tool.cli._weights import DTYPE_NAMES, announce_base, as_trained, run_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add = add_to(parser)
    several = partial(add, nargs="+", default=[])
    add("model", "MODEL", "a model folder, 16-bit or 4-bit, or a .gguf file")
    several("--data", "FILE", "texts: any file that training reads, or .txt")
    parser.add_argument("--choices", nargs="*", help=argparse.SUPPRESS)  # of older versions
    several(
        "--columns", "KEY=COLUMN", "columns of the files, as data.columns (default: the adapter's)"
    )
    several("--lm-eval", "TASK", "tasks of lm-eval, if it is installed")
    add("--adapter", "DIR", "an adapter, measured on the weights that it was trained on")
    add("--shipped", "DIR", "a model that the adapter was merged into: what it keeps")
    several("--compare", "METHOD", "4-bit forms of a 16-bit model: rtn, wmse, gptq (default: rtn)")
    add("--calibration", "FILE", "text for wmse and gptq; not one that is evaluated")
    add("--reference", "DIR", "the 16-bit model that a 4-bit MODEL was made from")
    add("--max-length", "N", "tokens a row (default: 1024)", default=1024, least=2)
    add("--rows", "N", "only the first N rows of each file or task", least=1)
    add(
        "--answers",
        "N",
        "print the answers to the first N rows of each file (default: 5 with --adapter)",
        least=0,
    )
    add(
        "--train-on",
        ("answers", "all"),
        "predicted part of a conversation (default: answers)",
        default="answers",
    )
    dtype = (
        "of activations and of what is not 4-bit (default: bfloat16, or float16 on a card without it)"
    )
    add("--dtype", DTYPE_NAMES, dtype)
    add("--report", "DIR", "write report.md, report.json and report.png there")
    add("--json", None, "print the result as one JSON object")
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
    options["dtype"] = getattr(torch, args.dtype or card_dtype())

    def note(line: str) -> None:
        if not args.json:
            print(line, flush=True)

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
        for text in texts:
            note(text.about)
        count = args.answers if args.answers is not None else 5 if args.adapter else 0
        limits = {"limit": args.rows, "answered": count, "pad_id": padding_id(tokenizer)}
        result = compare(variants, texts, tokenizer, tasks=args.lm_eval, note=note, **limits)
    if args.report:
        about = [
            f"{name}: {value}"
            for name in ("calibration", "adapter", "shipped")
            if (value := getattr(args, name))
        ]
        about += [f"16-bit reference: {args.reference}"] if args.reference else []
        with as_write_error(args.report):
            drawn = write_report(result, args.report, [*(text.about for text in texts), *about])
        note(
            f"report: {args.report}"
            + ("" if drawn else " (without report.png: pip install matplotlib draws it)")
        )
    peak = peak_rss_bytes()
    hashes = {text.name: text.sha256 for text in texts}
    lines = ["", *map(printable, tables(result)), "", f"peak memory {peak / 2**20:,.0f} MiB"]
    print_result(args, {**result.as_dict(), "sha256": hashes, "peak_rss_bytes": peak}, lines)
    return 0


def _columns(args: argparse.Namespace) -> dict[str, str]:
    """``data.columns``: as given, or of the run that made the adapter."""
    if not args.columns:
        run = run_of(args.adapter)
        return {} if run is None else run.columns
    require("qlora eval --columns", "pydantic")
    from qlora_native.tool.config import TrainConfig

    values = {"model": str(args.model), "data": {"train": "rows.jsonl"}}
    return TrainConfig.from_values(values, ["--columns", *args.columns]).data.columns


def _check(args: argparse.Namespace) -> None:
    """UserError for arguments that do not go together."""
    if args.choices is not None:
        raise UserError(
            "qlora eval: --choices is gone: --lm-eval TASK measures multiple choice, also on your own rows"
        )
    if not (args.data or args.lm_eval):
        raise UserError(
            "qlora eval: nothing to evaluate on; give --data FILE or --lm-eval TASK (or both)"
        )
    names = [file.name for file in args.data]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"qlora eval: two files are called {min(twice)}, which no report can distinguish; rename one"
        )
    if args.calibration is not None and args.calibration.resolve() in {
        file.resolve() for file in args.data
    }:
        raise UserError(
            f"qlora eval: {args.calibration} is evaluated and calibrated on, which flatters the result; "
            "give another file to --calibration"
        )
