"""``qlora eval``: what 4 bits and an adapter did to a model, on the user's own texts and questions."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_native.errors import UserError

if TYPE_CHECKING:
    from qlora_native.evaluate import Variants


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, 16-bit or 4-bit, or a .gguf file")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="texts: any file that training reads, or .txt"
    )
    parser.add_argument(
        "--choices", nargs="+", default=[], metavar="FILE", help="rows with question, choices and answer, such as JSONL"
    )
    parser.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval, if it is installed")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter, measured on the first 4-bit form")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="4-bit forms of a 16-bit model: rtn, rtn_signed, wmse, gptq (default: rtn)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="text for wmse and gptq; not one that is evaluated")
    parser.add_argument("--reference", metavar="DIR", help="the 16-bit model that a 4-bit MODEL was made from")
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens a row (default: 1024)")
    parser.add_argument("--rows", type=int, metavar="N", help="only the first N rows of each file or task")
    parser.add_argument(
        "--train-on",
        choices=("answers", "all"),
        default="answers",
        help="what is predicted of a conversation (default: answers)",
    )
    parser.add_argument("--report", metavar="DIR", help="write report.md, report.json and report.png there")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.epilog = """A 16-bit MODEL is compared with its 4-bit forms: loss, perplexity, KL divergence from 16 bits,
each with its standard error
over rows. One model is in memory at a time; of the 16-bit one, two bytes for each token and element of its hidden state
are kept in a temporary file. A question is answered by the choice that is likeliest behind "Question: ...\\nAnswer:".

examples:
  qlora eval Llama-3.1-8B --data heldout.jsonl --adapter run/adapter
  qlora eval Llama-3.1-8B --data heldout.jsonl notes.txt --compare rtn wmse gptq --calibration train.jsonl --report eval
  qlora eval Llama-3.1-8B-nf4 --reference Llama-3.1-8B --choices questions.jsonl"""


def run(args: argparse.Namespace) -> int:
    """Read, then measure, then tell."""
    _check(args)
    import torch

    from qlora_native._io import as_user_error, as_write_error
    from qlora_native._memory import peak_rss_bytes
    from qlora_native.data import padding_id
    from qlora_native.evaluate import Variants, compare, load_choices, load_text
    from qlora_native.evaluate.harness import check_harness
    from qlora_native.evaluate.report import tables, write_report
    from qlora_native.hf.source import load_tokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.lm_eval:
        check_harness()
    with as_user_error():
        sides = Variants(
            Path(args.model).expanduser(),
            methods=list(dict.fromkeys(args.compare)),
            adapter=_path(args.adapter),
            reference=_path(args.reference),
            calibration=_path(args.calibration),
            options={"device": "cuda"} if torch.cuda.is_available() else {},
        )
        tokenizer = load_tokenizer(str(sides.model))
        about = {"max_length": args.max_length, "limit": args.rows}
        texts = [load_text(path, tokenizer, train_on=args.train_on, **about) for path in args.data]
        choices = [load_choices(path, tokenizer, **about) for path in args.choices]

        def note(line: str) -> None:
            if not args.json:
                print(line, flush=True)

        for text in texts:
            note(text.about)
        result = compare(
            sides,
            texts,
            choices,
            tokenizer,
            pad_id=padding_id(tokenizer),
            tasks=args.lm_eval,
            limit=args.rows,
            note=note,
        )
    if args.report:
        folder = Path(args.report).expanduser()
        with as_write_error(folder):
            drawn = write_report(result, folder, [text.about for text in texts] + _told(sides))
        note(f"report: {folder}" + ("" if drawn else " (without report.png: pip install matplotlib draws it)"))
    if args.json:
        hashes = {text.name: text.sha256 for text in texts}
        print(json.dumps({**result.as_dict(), "sha256": hashes, "peak_rss_bytes": peak_rss_bytes()}))
        return 0
    print("", *tables(result), "", f"peak memory {peak_rss_bytes() / 2**20:,.0f} MiB", sep="\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """UserError for what can be seen without reading anything."""
    if not (args.data or args.choices or args.lm_eval):
        raise UserError(
            "qlora eval: nothing to evaluate on; give --data FILE, --choices FILE or --lm-eval TASK (any of them)"
        )
    if args.max_length < 2:
        raise UserError(f"qlora eval: --max-length is {args.max_length}: expected 2 or more")
    if args.rows is not None and args.rows < 1:
        raise UserError(f"qlora eval: --rows is {args.rows}: expected 1 or more")
    files = [*args.data, *args.choices]
    names = [Path(file).name for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"qlora eval: two files are called {twice}, so the report could not tell them apart; rename one"
        )
    if args.calibration is not None:
        evaluated = {Path(file).expanduser().resolve() for file in files}
        if Path(args.calibration).expanduser().resolve() in evaluated:
            raise UserError(
                f"qlora eval: {args.calibration} is evaluated and calibrated on, which flatters the result; "
                "give another file to --calibration"
            )


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


def _told(sides: Variants) -> list[str]:
    told: dict[str, Any] = {
        "calibration": sides.calibration,
        "adapter": sides.adapter,
        "16-bit reference": sides.reference,
    }
    return [f"{name}: {value}" for name, value in told.items() if value is not None]
