"""Data files, tokenized: flat arrays of ids and labels, which may be larger than memory, and their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qlora_native._io import as_user_error, as_write_error
from qlora_native.data.batching import permutation
from qlora_native.data.formats import infer_format, normalize
from qlora_native.data.readers import FIRST_ROWS, content_hash, read_rows
from qlora_native.data.template import ChatEncoder, TrainOn
from qlora_native.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_BYTES = 128 << 20  # tokens and labels up to this stay in memory; more are mapped from a file


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """The counts of data files; those of a subset, but for the rows that were dropped from the files."""

    path: str  # as the caller named it; those of several files joined by " + ", as their formats are
    files: dict[str, str]  # SHA-256 in hexadecimal of each whole file, by its path
    format: str  # one of FORMATS
    inferred: bool  # from the first rows
    template: str  # "tokenizer", "default" or "none" (rows without messages)
    max_length: int
    train_on: str
    rows: int  # kept
    dropped: int  # without a trained token within max_length
    dropped_too_long: int  # those of them that are longer than max_length
    truncated: int  # rows kept that lost tokens at their right end
    tokens: int  # of the rows kept
    trained_tokens: int
    # Rows whose system message went into the first user message, as the template takes none.
    folded_system: int

    @property
    def share_trained(self) -> float:
        """Trained tokens over tokens, 0 to 1."""
        return self.trained_tokens / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON and model cards."""
        return {**asdict(self), "share_trained": self.share_trained}

    def describe(self) -> str:
        """One line to print: the format, how it was found, and the counts."""
        inferred = " (inferred from the first rows)" if self.inferred else ""
        template = (
            ", default chat template (the tokenizer has none)" if self.template == "default" else ""
        )
        moved = f"; {self.folded_system:,} system messages put before the first user message"
        return (
            f"{self.path}: format {self.format}{inferred}{template}; {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.share_trained:.0%} trained; {self.truncated:,} truncated to {self.max_length:,} tokens, "
            f"{self.dropped:,} dropped{moved if self.folded_system else ''}"
        )


class Dropped(NamedTuple):
    """Rows left out: their lines, int64 [dropped], and which of them are longer than ``max_length``, bool [dropped]."""

    lines: np.ndarray
    too_long: np.ndarray


def _counts(lengths: np.ndarray, trained: np.ndarray, truncated: np.ndarray) -> dict[str, Any]:
    """Fields of the statistics of rows."""
    sums = {"tokens": lengths, "trained_tokens": trained, "truncated": truncated}
    return {"rows": len(lengths), **{name: int(values.sum()) for name, values in sums.items()}}


@dataclass(eq=False)
class TokenizedDataset(Sequence[dict[str, np.ndarray]]):
    """Rows of token ids and labels in flat arrays; ``dataset[i]`` is ``{"input_ids", "labels"}``, int32 [length] each.

    Rows are read-only views, and subsets share the flat arrays, which may be mapped from a file: row i is
    ``input_ids[starts[i]:starts[i] + lengths[i]]``. The first label of a row is always -100, so rows may be laid end to
    end. The other arrays stay in memory, 31 bytes a row.
    """

    input_ids: np.ndarray  # int32 [tokens of the file]
    labels: np.ndarray  # int32 [tokens of the file]
    starts: np.ndarray  # int64 [rows]
    lengths: np.ndarray  # int64 [rows]
    trained: np.ndarray  # int32 [rows], trained tokens
    lines: np.ndarray  # int64 [rows], in the file, from 1 (Parquet: rows)
    file: np.ndarray  # int16 [rows], the number of the row's file
    truncated: np.ndarray  # bool [rows]
    dropped: Dropped  # of the file; a subset keeps them
    stats: DatasetStats

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        at = range(len(self))[index]
        part = slice(self.starts[at], self.starts[at] + self.lengths[at])
        return {"input_ids": self.input_ids[part], "labels": self.labels[part]}

    def subset(self, indices: Sequence[int] | np.ndarray) -> TokenizedDataset:
        """A dataset of those rows in that order; its stats count these rows, but for what was dropped."""
        names = ("starts", "lengths", "trained", "lines", "file", "truncated")
        part = replace(self, **{name: getattr(self, name)[indices] for name in names})
        part.stats = replace(self.stats, **_counts(part.lengths, part.trained, part.truncated))
        return part

    def split(self, held_out: int, seed: int = 0) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Training rows and ``held_out`` others, chosen by ``seed``, each in the order of the file; UserError if none
        are left to train on."""
        if held_out >= len(self):
            raise UserError(
                f"{self.stats.path} has {len(self)} usable rows: holding {held_out} out leaves none to learn from; "
                "add rows or set data.eval_fraction to 0"
            )
        order = permutation(len(self), seed)
        return self.subset(np.sort(order[held_out:])), self.subset(np.sort(order[:held_out]))


# What is kept of each row beside its tokens, in the order of the fields of a TokenizedDataset.
_ROW = np.dtype(
    [("length", "i8"), ("trained", "i4"), ("line", "i8"), ("file", "i2"), ("truncated", "?")]
)


def load_split(
    train: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: str | None = None,
    fraction: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training rows, and held-out rows: those of a file, a ``fraction`` of the training rows, or None. ``options`` are
    those of :func:`load_dataset`; a wrong one is a UserError."""
    with as_user_error():
        rows = load_dataset(train, tokenizer, **options)
        if held_out is not None:
            return rows, load_dataset(held_out, tokenizer, **options)
    if fraction == 0:
        return rows, None
    # A few rows still give a held-out loss.
    return rows.split(max(1, round(fraction * len(rows))), seed)


def load_dataset(
    path: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    format: str | None = None,
    train_on: TrainOn = "answers",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    folder: Path | None = None,
) -> TokenizedDataset:
    """Read, normalize and tokenize data files, row by row: neither the files nor their tokens need fit into memory.

    UserError if the file or a row is wrong (with file and line), or no row has a token to train on.

    Args:
        max_length: tokens a row may have; longer rows lose their right end.
        format: one of ``FORMATS``, or None to infer it from the first rows of each file.
        train_on: "answers" or "all"; see :mod:`qlora_native.data.template`.
        columns: the files' columns by the key that each stands for: ``{"prompt": "question"}``.
        limit: read only this many rows of each file.
        folder: where tokens beyond some 16 million go; by default the system's folder for temporary files.
    """
    encoder = ChatEncoder(tokenizer, max_length=max_length, train_on=train_on)
    paths = [path] if isinstance(path, (str, Path)) else path
    where = " + ".join(map(str, paths))
    formats = dict[str, None]()
    folder = folder or Path(gettempdir())
    writing = partial(
        as_write_error, folder, "; the tokens of the data do not fit into memory, so make room there"
    )
    with_messages = False
    table = bytearray()
    with writing():
        folder.mkdir(parents=True, exist_ok=True)
    # On disk the file has no name, and vanishes in any case.
    with SpooledTemporaryFile(CHUNK_BYTES, dir=str(folder)) as file:
        for number, each in enumerate(paths):
            rows = read_rows(each, limit=limit, columns=columns)
            first = list(islice(rows, FIRST_ROWS))
            name = format or infer_format(first, columns or ())
            formats[name] = None
            for source in chain(first, rows):
                row = normalize(source, name)
                with_messages |= row.messages is not None
                made = encoder.encode(row)
                known = len(made.input_ids), made.trained, row.line, number, made.truncated > 0
                table += np.array(known, _ROW).tobytes()
                if made.trained:
                    with writing():
                        file.write(np.array([made.input_ids, made.labels], np.int32).T.tobytes())
        is_on_disk = file.tell() > CHUNK_BYTES
        with writing():
            file.seek(0)
        tokens = np.memmap(file, np.int32, "r") if is_on_disk else np.frombuffer(file.read(), np.int32)
    seen = np.frombuffer(table, _ROW)
    kept, dropped = (seen[(seen["trained"] > 0) == is_kept] for is_kept in (True, False))
    too_long = int(dropped["truncated"].sum())
    if not len(kept):
        advice = "add assistant messages, or set train_on to 'all'"
        why = f"none of the {len(dropped)} rows has an answer to train on; {advice}"
        if too_long:
            late = f"{too_long} of {len(dropped)} rows begin their answer after max_length={max_length} tokens"
            why = f"no row has a trained token left, as {late}; raise max_length"
        raise UserError(f"{where}: {why}.")
    lengths = kept["length"]
    return TokenizedDataset(
        tokens[::2],
        tokens[1::2],
        np.cumsum(lengths) - lengths,
        lengths,
        kept["trained"],
        kept["line"],
        kept["file"],
        kept["truncated"],
        Dropped(dropped["line"], dropped["truncated"]),
        DatasetStats(
            path=where,
            files={str(each): content_hash(each) for each in paths},
            format=" + ".join(formats),
            inferred=format is None,
            template=("default" if encoder.uses_default_template else "tokenizer")
            if with_messages
            else "none",
            max_length=max_length,
            train_on=train_on,
            dropped=len(dropped),
            dropped_too_long=too_long,
            folded_system=encoder.folded_system,
            **_counts(lengths, kept["trained"], kept["truncated"]),
        ),
    )
