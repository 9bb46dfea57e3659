"""``qlora data``: a data file as the model will see it, before any training."""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_native.errors import UserError
from qlora_native.tool.cli._run import add_to, missing_packages, picture, printable

if TYPE_CHECKING:
    from qlora_native.data.dataset import TokenizedDataset
    from qlora_native.data.readers import SourceRow
    from qlora_native.data.template import ChatEncoder, Encoded
    from qlora_native.tool.config import TrainConfig

CONFIG_SUFFIXES = (".yaml", ".yml")
BINS = 12  # of the histogram of lengths
BAR = 40  # characters of its longest bar
MOST_LINES = 10  # named of the rows that were truncated or dropped


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.usage = "qlora data show|check CONFIG|FILE [--model DIR] [options] [--key value ...]"
    add = add_to(parser)
    parser.add_argument("action", choices=("show", "check"))
    add(
        "source",
        "CONFIG|FILE",
        "a config of qlora train, or a data file, which --train FILE names too",
        nargs="?",
    )
    add("--train", "FILE", argparse.SUPPRESS, nargs="+", type=str)
    add("--model", "DIR", "the model whose tokenizer reads a data file", type=str)
    add("--rows", "N", "how many rows to show (default: 3)", default=3, least=0)
    add("--row", "N", "show the row on this line of the file (Parquet: row)")
    add("--limit", "N", "read the first N rows of a file only", least=1)
    add("--png", "FILE", "draw the histogram of lengths too")
    add("--json", None, "print one JSON object")
    parser.epilog = """Prints the format of the file, how long its rows are, which are truncated or dropped and why, and
rows with their trained tokens in color; between [[ and ]] when the output is not a terminal.
Keys of a config (--max_length, --format, --train_on, --packing) can be set for a data file too.

check names what trains nothing or the wrong thing, and exits with 2 if there is any; `qlora train` does it first.

examples:
  qlora data show config.yaml
  qlora data check config.yaml
  qlora data show train.jsonl --model models/llama --max_length 512 --row 17"""


def run(args: argparse.Namespace) -> int:
    """Read, count, show."""
    config = _config(args)
    from qlora_native.data.batching import evaluation_order
    from qlora_native.data.dataset import load_split
    from qlora_native.data.readers import read_rows
    from qlora_native.data.template import ChatEncoder
    from qlora_native.weights.open import load_tokenizer

    data = config.data
    paths = [*data.files, *([data.eval] if data.eval else [])]
    for path in paths:
        read_rows(path)  # a missing file is reported before the tokenizer is loaded
    tokenizer = config.add_tokens_and_template(load_tokenizer(config.model, config.adapter))
    if args.action == "check":
        return _check(args, config, tokenizer)
    files = [load_split(path, tokenizer, limit=args.limit, **data.options)[0] for path in paths]
    lengths = np.concatenate([file.lengths for file in files[: len(data.files)]])
    encoder = ChatEncoder(tokenizer, max_length=data.max_length, train_on=data.train_on)
    rows = []
    for path, file in zip(data.files, files, strict=False):
        sources = read_rows(path, limit=args.limit, columns=data.columns)
        wanted = (
            islice(sources, args.rows)
            if args.row is None
            else (row for row in sources if row.line == args.row)
        )
        rows += [{"file": path, **_row(encoder, row, file.stats.format)} for row in wanted]
    if args.row is not None and not rows:
        last = max(
            int(lines[-1])
            for file in files
            for lines in (file.lines, file.dropped.lines)
            if len(lines)
        )
        raise UserError(
            f"{' and '.join(data.files)}: no row is on line {args.row}, the last one is on line {last:,}"
        )
    if args.png:
        with picture("--png", args.png) as figure:
            axes = figure.add_subplot(xlabel="tokens", ylabel="rows")
            axes.hist(lengths, bins=50)
            axes.axvline(
                data.max_length, color="black", linestyle="--", label=f"max_length {data.max_length:,}"
            )
            axes.legend()
    summaries = [_summary(file) for file in files]
    packed: dict[str, Any] | None = None
    if data.packing:
        count = len(evaluation_order(lengths, data.max_length))
        filled = int(lengths.sum()) / (count * data.max_length)
        packed = {"sequences": count, "length": data.max_length, "filled": filled}
    if args.json:
        print(json.dumps({"files": summaries, "packing": packed, "rows": rows}, indent=2))
        return 0
    for file, numbers in zip(files, summaries, strict=True):
        _print_file(file, numbers)
    if data.packing:
        print(
            f"packed: about {count:,} sequences of {data.max_length:,} tokens an epoch, {filled:.1%} full"
        )
    for row in rows:
        _print_row(row)
    return 0


def _check(args: argparse.Namespace, config: TrainConfig, tokenizer: Any) -> int:
    from qlora_native._io import user_path
    from qlora_native.data.check import iter_findings
    from qlora_native.data.dataset import load_split
    from qlora_native.weights.open import open_source

    text: Any = open_source(user_path(config.model)).config.get_text_config()
    rows, held_out = load_split(tokenizer=tokenizer, limit=args.limit, **config.row_options)
    positions, embeddings = (
        getattr(text, name, None) for name in ("max_position_embeddings", "vocab_size")
    )
    trained = config.lora.as_config(config.train.seed, tokenizer).trainable_tokens  # new ones get rows
    embeddings = embeddings and max([embeddings, *(token + 1 for token in trained)])
    findings = list(iter_findings(rows, held_out, tokenizer, positions, embeddings))
    if args.json:
        print(json.dumps({"findings": [finding._asdict() for finding in findings]}, indent=2))
        return 2 if findings else 0
    if findings:
        raise UserError(*(f"{rows.stats.path}: {finding}" for finding in findings))
    print(f"{rows.stats.describe()}\nnothing found")
    return 0


def _config(args: argparse.Namespace) -> TrainConfig:
    from qlora_native.tool.config import TrainConfig

    source, files, overrides = args.source, args.train, [*args.overrides]
    # The file may stand behind an option,
    if source is None and overrides and not overrides[0].startswith("--"):
        source = overrides.pop(0)  # where argparse does not look for what can be left out
    if args.model:
        overrides += ["--model", args.model]
    if source is not None and source.lower().endswith(CONFIG_SUFFIXES):
        return TrainConfig.from_file(source, [*overrides, *(["--train", *files] if files else [])])
    if (source is None) == (files is None):
        raise UserError(
            f"qlora data {args.action}: expected a config, or one of FILE and --train FILE"
        )
    files = files or [source]
    if not args.model:
        raise UserError(
            f"qlora data {args.action} {files[0]}: which tokens are trained depends on the model's tokenizer and "
            "chat template; name its folder with --model DIR"
        )
    return TrainConfig.from_values({"data": {"train": files, "eval_fraction": 0}}, overrides)


# ---- a file


def _summary(rows: TokenizedDataset) -> dict[str, Any]:
    """Stats, lengths, and the lines of the first rows that were truncated or dropped."""
    lengths, (dropped, too_long) = rows.lengths, rows.dropped
    return {
        **rows.stats.as_dict(),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "histogram": histogram(lengths),
        "truncated_lines": rows.lines[rows.truncated][:MOST_LINES].tolist(),
        "dropped_too_long_lines": dropped[too_long][:MOST_LINES].tolist(),
        "dropped_untrained_lines": dropped[~too_long][:MOST_LINES].tolist(),
    }


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) of up to twelve ranges of equal width that cover ``lengths``, int64 [rows]."""
    low = int(lengths.min())
    high = int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width)
    return [
        (low + at * width, low + (at + 1) * width - 1, int(count)) for at, count in enumerate(counts)
    ]


def _print_file(rows: TokenizedDataset, numbers: dict[str, Any]) -> None:
    stats = rows.stats
    print(stats.describe())
    within = f"within max_length={stats.max_length}"
    for key, count, why in (
        ("truncated_lines", stats.truncated, f"truncated: longer than max_length={stats.max_length}"),
        ("dropped_too_long_lines", stats.dropped_too_long, f"dropped: no trained token {within}"),
        (
            "dropped_untrained_lines",
            stats.dropped - stats.dropped_too_long,
            "dropped: nothing to train on",
        ),
    ):
        if count:
            named = ", ".join(map(str, numbers[key])) + (", ..." if count > len(numbers[key]) else "")
            several = "s" * (count > 1)
            print(f"  {why}: {count:,} row{several}, on line{several} {named}")
    print(
        f"tokens a row: {numbers['shortest']:,} to {numbers['longest']:,}, median {numbers['median']:,.0f}"
    )
    most = max(count for *_, count in numbers["histogram"])
    width = len(f"{numbers['histogram'][-1][1]:,}")
    for low, high, count in numbers["histogram"]:
        print(
            f"  {low:>{width},} to {high:>{width},}  {'#' * -(-BAR * count // most):<{BAR}} {count:,}".rstrip()
        )


# ---- a row


def _row(encoder: ChatEncoder, source: SourceRow, format: str) -> dict[str, Any]:
    """One row for JSON: its counts, why it is dropped if it is, and its text in parts that are trained or not."""
    from qlora_native.data.formats import normalize

    encoded = encoder.encode(normalize(source, format))
    dropped = (
        f"no trained token within max_length={encoder.max_length}"
        if encoded.truncated
        else "nothing to train on"
    )
    return {
        "line": source.line,
        "tokens": len(encoded.input_ids),
        "trained": encoded.trained,
        "cut": encoded.truncated,
        "dropped": None if encoded.trained else dropped,
        "parts": _parts(encoder.tokenizer, encoded),
    }


def _parts(tokenizer: Any, encoded: Encoded) -> list[dict[str, Any]]:
    """The text of each run of tokens that are trained or are not."""
    from qlora_native.data.template import IGNORE_INDEX

    parts: list[dict[str, Any]] = []
    done = ""
    end = 0
    for trained, run in groupby(label != IGNORE_INDEX for label in encoded.labels):
        end += len(list(run))
        # Decoded from the start: a tokenizer may drop the space before the first token that it is given.
        ids = encoded.input_ids[:end]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append({"text": text[len(done) :], "trained": trained})
        done = text
    return parts


def _print_row(row: dict[str, Any]) -> None:
    truncated = f", {row['cut']:,} more truncated" if row["cut"] else ""
    dropped = f"; dropped: {row['dropped']}" if row["dropped"] else ""
    counts = f"{row['tokens']:,} tokens, {row['trained']:,} of them trained"
    print(f"\n{row['file']}:{row['line']}: {counts}{truncated}{dropped}")
    parts = [(printable(part["text"]), part["trained"]) for part in row["parts"]]
    # A notebook shows colors as a terminal does.
    if not sys.stdout.isatty() or missing_packages(("rich",)) or "NO_COLOR" in os.environ:
        print("".join(f"[[{text}]]" if trained else text for text, trained in parts))
        return
    from rich.console import Console
    from rich.text import Text

    colored = Text.assemble(*((text, "bold green" if trained else "") for text, trained in parts))
    Console(highlight=False).print(colored, soft_wrap=True)
