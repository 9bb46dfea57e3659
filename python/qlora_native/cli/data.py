"""``qlora data``: a data file as the model will see it, before any training."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_native.cli.main import missing_modules
from qlora_native.errors import UserError

if TYPE_CHECKING:
    from qlora_native.config import TrainConfig
    from qlora_native.data import TokenizedDataset

CONFIG_SUFFIXES = (".yaml", ".yml")
BAR = 40  # characters of the longest bar of a histogram


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.usage = "qlora data show CONFIG|FILE [--model DIR] [options] [--key value ...]"
    parser.add_argument("action", choices=("show",))
    parser.add_argument("source", metavar="CONFIG|FILE", help="a config of qlora train, or a data file")
    parser.add_argument("--model", metavar="DIR", help="the model whose tokenizer reads a data file")
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="how many rows to show (default: 3)")
    parser.add_argument("--row", metavar="LINE", type=int, help="show the row on this line of the file (Parquet: row)")
    parser.add_argument("--limit", metavar="N", type=int, help="look at the first N rows of a file only")
    parser.add_argument("--png", metavar="FILE", help="draw the histogram of lengths too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = """Says which format the file has, how long its rows are, which of them are cut or dropped and why,
and shows rows with their trained tokens in color; between [[ and ]] when the output is not a terminal.
Keys of a config (--max_length, --format, --train_on, --packing) can be set for a data file too.

examples:
  qlora data show config.yaml
  qlora data show train.jsonl --model models/llama --max_length 512 --row 17"""


def run(args: argparse.Namespace) -> int:
    """Read, count, show."""
    config = _config(args)
    from qlora_native.data import ChatEncoder
    from qlora_native.data.preview import plot_lengths, render, summary
    from qlora_native.data.readers import read_rows
    from qlora_native.hf.source import load_tokenizer

    if args.rows < 0 or (args.limit is not None and args.limit < 1):
        raise UserError("qlora data show: --rows wants a number from 0, --limit one from 1")
    paths = [path for path in (config.data.train, config.data.eval) if path is not None]
    for path in paths:
        read_rows(path)  # a missing file is told before the tokenizer is loaded
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(config.model)
    files = [config.data.load(path, tokenizer, limit=args.limit) for path in paths]
    train = files[0]
    encoder = ChatEncoder(tokenizer, max_length=config.data.max_length, train_on=config.data.train_on)
    sources = read_rows(config.data.train, limit=args.limit)
    if args.row is not None:
        chosen = [row for row in sources if row.line == args.row]
        if not chosen:
            raise UserError(
                f"{config.data.train} has no row on line {args.row}: its rows stand on lines {train.lines[0]:,} to "
                f"{max(train.lines[-1], *train.dropped.lines[-1:], 1):,}"
            )
    else:
        chosen = [row for row, _ in zip(sources, range(args.rows), strict=False)]
    rows = [render(encoder, row, train.stats.format) for row in chosen]
    if args.png:
        _draw(plot_lengths, train, config.data.max_length, Path(args.png))
    summaries = [summary(file) for file in files]
    packed = _packed(config, train)
    if args.json:
        print(json.dumps({"files": summaries, "packing": packed, "rows": rows}, indent=2))
        return 0
    for file, numbers in zip(files, summaries, strict=True):
        _tell(file, numbers)
    if packed is not None:
        print(
            f"packed: about {packed['sequences']:,} sequences of {packed['length']:,} tokens an epoch, "
            f"{packed['filled']:.1%} full"
        )
    for row in rows:
        _show(row, train.stats.path)
    return 0


def _config(args: argparse.Namespace) -> TrainConfig:
    from qlora_native.config import TrainConfig
    from qlora_native.data import DATA_SUFFIXES
    from qlora_native.data.readers import read_rows

    overrides = [*(["--model", args.model] if args.model else []), *args.overrides]
    suffix = Path(args.source).suffix.lower()
    if suffix in CONFIG_SUFFIXES:
        return TrainConfig.from_file(args.source, overrides)
    if suffix not in DATA_SUFFIXES:
        raise UserError(
            f"{args.source}: got a '{suffix}' file, expected a config ({', '.join(CONFIG_SUFFIXES)}) or data "
            f"({', '.join(DATA_SUFFIXES)})"
        )
    read_rows(args.source)
    if not args.model:
        raise UserError(
            f"qlora data show {args.source}: which tokens are trained depends on the model's tokenizer and chat "
            "template; name its folder with --model DIR"
        )
    return TrainConfig.from_values({"data": {"train": args.source, "eval_fraction": 0}}, overrides)


def _packed(config: TrainConfig, rows: TokenizedDataset) -> dict[str, Any] | None:
    from qlora_native.data.packing import evaluation_order

    if not config.data.packing:
        return None
    length = config.data.max_length
    sequences = len(evaluation_order(rows.lengths, length))
    return {"sequences": sequences, "length": length, "filled": rows.stats.tokens / (sequences * length)}


def _draw(plot_lengths: Any, rows: TokenizedDataset, max_length: int, picture: Path) -> None:
    try:
        plot_lengths(rows.lengths, max_length, picture)
    except ImportError as error:
        raise UserError(f"--png needs matplotlib, which is not installed: pip install matplotlib ({error})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"could not write {picture}: {getattr(error, 'strerror', None) or error}") from None


def _tell(rows: TokenizedDataset, numbers: dict[str, Any]) -> None:
    stats = rows.stats
    print(stats.describe())
    for count, why, lines in (
        (stats.truncated, f"cut: longer than max_length={stats.max_length}", numbers["truncated_lines"]),
        (
            stats.dropped_too_long,
            f"dropped: no trained token within max_length={stats.max_length}",
            numbers["dropped_too_long_lines"],
        ),
        (
            stats.dropped - stats.dropped_too_long,
            "dropped: nothing to train on",
            numbers["dropped_untrained_lines"],
        ),
    ):
        if count:
            named = ", ".join(map(str, lines)) + (", ..." if count > len(lines) else "")
            print(f"  {why}: {count:,} {'row' if count == 1 else 'rows'}, on {_lines(lines)} {named}")
    print(f"tokens a row: {numbers['shortest']:,} to {numbers['longest']:,}, median {numbers['median']:,.0f}")
    most = max(count for *_, count in numbers["histogram"])
    width = len(f"{numbers['histogram'][-1][1]:,}")
    for low, high, count in numbers["histogram"]:
        print(f"  {low:>{width},} to {high:>{width},}  {'#' * -(-BAR * count // most):<{BAR}} {count:,}".rstrip())


def _lines(lines: list[int]) -> str:
    return "line" if len(lines) == 1 else "lines"


def _show(row: dict[str, Any], path: str) -> None:
    words = f"{path}:{row['line']}: {row['tokens']:,} tokens, {row['trained']:,} of them trained"
    if row["cut"]:
        words += f", {row['cut']:,} more cut off"
    if row["dropped"]:
        words += f"; dropped: {row['dropped']}"
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ and not missing_modules(["rich"])
    print(f"\n{words}")
    if not colors:
        print("".join(f"[[{_printable(p['text'])}]]" if p["trained"] else _printable(p["text"]) for p in row["parts"]))
        return
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for part in row["parts"]:
        text.append(_printable(part["text"]), style="bold green" if part["trained"] else "")
    Console(highlight=False).print(text, soft_wrap=True)


def _printable(text: str) -> str:
    """Without the control characters by which a row could command a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)
