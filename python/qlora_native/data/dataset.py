"""A data file, tokenized: flat arrays of ids and labels, and the numbers a user asks about them."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from qlora_native._io import sha256
from qlora_native.data.batching import permutation
from qlora_native.data.formats import FORMATS, INFER_ROWS, infer_format, normalize
from qlora_native.data.growing import GrowingArray
from qlora_native.data.readers import read_rows
from qlora_native.data.template import ChatEncoder, TrainOn
from qlora_native.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What became of a file.

    Attributes:
        path: the file as the caller named it.
        sha256: of the whole file, in hexadecimal.
        format: one of ``FORMATS``; ``inferred`` tells whether it was guessed from the first rows or asked for.
        template: "tokenizer", "default" or "none" (rows without messages).
        rows: rows kept.
        dropped: rows of the file left out because no trained token remained within ``max_length``; a subset keeps it.
        dropped_too_long: those of them that are longer than ``max_length``, which may have cut their answer off.
        truncated: rows kept that lost tokens at their right end.
        tokens, trained_tokens: over the rows kept.
        folded_system: rows whose system message went into the first user message, as the template takes none.
    """

    path: str
    sha256: str
    format: str
    inferred: bool
    template: str
    max_length: int
    train_on: str
    rows: int
    dropped: int
    dropped_too_long: int
    truncated: int
    tokens: int
    trained_tokens: int
    folded_system: int

    @property
    def share_trained(self) -> float:
        """Trained tokens over tokens, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON and model cards."""
        return {**asdict(self), "share_trained": self.share_trained}

    def describe(self) -> str:
        """One line to print: the format, how it was found, and the counts."""
        how = f"format {self.format}" + (" (inferred from the first rows)" if self.inferred else "")
        if self.template == "default":
            how += ", default chat template (the tokenizer has none)"
        line = (
            f"{self.path}: {how}; {self.rows:,} rows, {self.tokens:,} tokens, {self.share_trained:.0%} trained; "
            f"{self.truncated:,} cut to {self.max_length:,} tokens, {self.dropped:,} dropped"
        )
        if self.folded_system:
            line += f"; {self.folded_system:,} system messages put before the first user message"
        return line


class Dropped(NamedTuple):
    """Rows left out: their lines, int64 [dropped], and which of them are longer than ``max_length``, bool [dropped]."""

    lines: np.ndarray
    too_long: np.ndarray


class TokenizedDataset(Sequence[dict[str, np.ndarray]]):
    """Rows of token ids and labels in flat arrays; ``dataset[i]`` is ``{"input_ids", "labels"}``, int32 [length] each.

    Rows are read-only views, no copies, and subsets share the flat arrays, which may be mapped from a file: row i is
    ``input_ids[starts[i]:starts[i] + lengths[i]]``. The first label of a row is always -100, so rows may be laid end to
    end. What grows with the rows and stays in memory takes 29 bytes a row.

    Attributes:
        input_ids, labels: int32 [tokens of the file].
        starts, lengths: int64 [rows].
        trained: int32 [rows], trained tokens per row.
        lines: int64 [rows], the line of the file each row came from (Parquet: the row), from 1.
        truncated: bool [rows].
        dropped: the lines of the file that were left out; a subset keeps them.
        stats: :class:`DatasetStats`.
    """

    def __init__(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray,
        lines: np.ndarray,
        truncated: np.ndarray,
        dropped: Dropped,
        stats: DatasetStats,
    ) -> None:
        self.input_ids, self.labels, self.starts, self.lengths = input_ids, labels, starts, lengths
        self.trained, self.lines, self.truncated = trained, lines, truncated
        self.dropped, self.stats = dropped, stats
        for held in (input_ids, labels, starts, lengths, trained, lines, truncated):
            held.flags.writeable = False

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        part = slice(self.starts[at], self.starts[at] + self.lengths[at])
        return {"input_ids": self.input_ids[part], "labels": self.labels[part]}

    def subset(self, indices: Sequence[int] | np.ndarray) -> TokenizedDataset:
        """A dataset of those rows in that order; its stats count these rows, but for what was dropped."""
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.ndim != 1 or np.any((chosen < 0) | (chosen >= len(self))):
            raise ValueError(f"subset: indices must be a list of row numbers from 0 to {len(self) - 1}")
        lengths, trained, truncated = self.lengths[chosen], self.trained[chosen], self.truncated[chosen]
        stats = replace(
            self.stats,
            rows=len(chosen),
            truncated=int(truncated.sum()),
            tokens=int(lengths.sum()),
            trained_tokens=int(trained.sum()),
        )
        flat = self.input_ids, self.labels
        rows = self.starts[chosen], lengths, trained, self.lines[chosen], truncated
        return TokenizedDataset(*flat, *rows, self.dropped, stats)

    def split(self, held_out: float | int, seed: int = 0) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Training and held-out rows, chosen by ``seed``, each in the order of the file.

        Args:
            held_out: a share of the rows below 1.0 (float), or their number (int).

        Raises:
            UserError: one of the two parts would be empty.
        """
        count = round(held_out * len(self)) if isinstance(held_out, float) else held_out
        if not 0 < count < len(self):
            raise UserError(
                f"{self.stats.path}: holding out {held_out} of {len(self)} rows leaves {len(self) - count} to train on "
                f"and {count} to evaluate, expected at least 1 of each; change the number held out or add rows."
            )
        order = permutation(len(self), seed)
        return self.subset(np.sort(order[count:])), self.subset(np.sort(order[:count]))


def load_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    format: str | None = None,
    train_on: TrainOn = "answers",
    limit: int | None = None,
    folder: str | Path | None = None,
) -> TokenizedDataset:
    """Read, normalize and tokenize a data file, row by row: neither the file nor its tokens need fit into memory.

    Args:
        path: a ``.jsonl``, ``.ndjson``, ``.json`` or ``.parquet`` file.
        tokenizer: a transformers tokenizer.
        max_length: tokens a row may have; longer rows lose their right end.
        format: one of ``FORMATS``, or None to infer it from the first rows.
        train_on: "answers" or "all"; see :mod:`qlora_native.data.template`.
        limit: read only this many rows of the file.
        folder: where tokens beyond some 16 million go, into files without a name; the system's folder for temporary
            files unless given.

    Raises:
        UserError: the file or a row is wrong (named by file and line), or no row has a token to train on.
        ValueError: a wrong argument.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected None or one of {', '.join(FORMATS)}")
    encoder = ChatEncoder(tokenizer, max_length=max_length, train_on=train_on)
    rows = read_rows(path, limit=limit)
    first = list(islice(rows, INFER_ROWS))
    name = format or infer_format(first)

    place = Path(folder or tempfile.gettempdir())
    ids, labels = GrowingArray(place), GrowingArray(place)
    lengths, lines, dropped = array("q"), array("q"), array("q")
    trained, cut, too_long = array("i"), bytearray(), bytearray()
    with_messages = False
    for source in chain(first, rows):
        row = normalize(source, name)
        with_messages |= row.messages is not None
        encoded = encoder.encode(row)
        if encoded.trained == 0:
            dropped.append(row.line)
            too_long.append(encoded.cut > 0)
            continue
        ids.extend(encoded.input_ids)
        labels.extend(encoded.labels)
        lengths.append(len(encoded.input_ids))
        trained.append(encoded.trained)
        lines.append(row.line)
        cut.append(encoded.cut > 0)
    if not lengths:
        raise UserError(_nothing_left(path, len(dropped), sum(too_long), max_length))

    counts = np.array(lengths, dtype=np.int64)
    stats = DatasetStats(
        path=str(path),
        sha256=sha256(Path(path).expanduser()),
        format=name,
        inferred=format is None,
        template=("default" if encoder.uses_default_template else "tokenizer") if with_messages else "none",
        max_length=max_length,
        train_on=train_on,
        rows=len(lengths),
        dropped=len(dropped),
        dropped_too_long=sum(too_long),
        truncated=sum(cut),
        tokens=int(counts.sum()),
        trained_tokens=sum(trained),
        folded_system=encoder.folded_system,
    )
    return TokenizedDataset(
        ids.finish(),
        labels.finish(),
        np.cumsum(counts) - counts,
        counts,
        np.array(trained, dtype=np.int32),
        np.array(lines, dtype=np.int64),
        np.array(cut, dtype=bool),
        Dropped(np.array(dropped, dtype=np.int64), np.array(too_long, dtype=bool)),
        stats,
    )


def _nothing_left(path: str | Path, dropped: int, too_long: int, max_length: int) -> str:
    if too_long:
        return (
            f"{path}: no row has a trained token left, as {too_long} of {dropped} rows begin their answer after "
            f"max_length={max_length} tokens; raise max_length."
        )
    return (
        f"{path}: none of the {dropped} rows has an answer to train on; "
        "add assistant messages, or set train_on to 'all'."
    )
