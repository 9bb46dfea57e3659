"""The texts of an evaluation: any file that training reads, or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_native._io import reading, regular, sha256, user_path
from qlora_native.data.dataset import load_dataset
from qlora_native.data.template import TrainOn
from qlora_native.errors import UserError
from qlora_native.tool.evaluate.measure import Rows

PLAIN_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Text:
    """One text, tokenized."""

    name: str  # of the file
    rows: Rows
    about: str  # a line to print: the file, its format and its counts
    sha256: str  # of the file, in hexadecimal


def load_text(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    train_on: TrainOn = "answers",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Text:
    """Tokenize a file, or its first ``limit`` rows; UserError if it cannot be read or has nothing to predict.

    Plain text (``.txt``, ``.md``, ``.rst``) is split into windows of ``max_length`` tokens, in which every token but
    the first is predicted; a rest of less than two tokens is left out. Every other file is read as for training: of a
    conversation the answers are predicted, or all of it with ``train_on="all"``. ``columns`` are as in load_dataset.
    """
    file = user_path(path)
    if file.suffix.lower() not in PLAIN_SUFFIXES:
        data = load_dataset(
            file, tokenizer, max_length=max_length, train_on=train_on, columns=columns, limit=limit
        )
        return Text(file.name, data, data.stats.describe(), data.stats.files[str(file)])
    with reading(file, "expected text in UTF-8"):
        text = regular(file).read_text(encoding="utf-8")
    ids = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32
    )
    windows = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    windows = [window for window in windows if len(window) > 1][:limit]
    if not windows:
        raise UserError(
            f"{file}: the file makes {len(ids)} tokens, expected at least 2; give a longer text."
        )
    tokens = sum(map(len, windows))
    about = f"{file}: plain text; {len(windows):,} windows of at most {max_length:,} tokens, {tokens:,} tokens"
    rows = [{"input_ids": window, "labels": window} for window in windows]
    return Text(file.name, rows, about, sha256(file))
