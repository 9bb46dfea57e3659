"""Data files, tokenized: flat arrays of ids and labels, which may be larger than memory, and their statistics."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol, overload

import numpy as np

from qlora_native._io import as_write_error
from qlora_native.data.batching import permutation
from qlora_native.data.formats import FORMATS, infer_format, normalize
from qlora_native.data.readers import FIRST_ROWS, content_hash, read_rows
from qlora_native.data.template import ChatEncoder, TrainOn
from qlora_native.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_BYTES = 64 << 20  # tokens below this stay in memory; more go to a file in pieces of this size


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
    folded_system: int  # rows whose system message went into the first user message, as the template takes none

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
            f"{self.truncated:,} truncated to {self.max_length:,} tokens, {self.dropped:,} dropped"
        )
        if self.folded_system:
            line += f"; {self.folded_system:,} system messages put before the first user message"
        return line


class Dropped(NamedTuple):
    """Rows left out: their lines, int64 [dropped], and which of them are longer than ``max_length``, bool [dropped]."""

    lines: np.ndarray
    too_long: np.ndarray


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

    def __post_init__(self) -> None:
        for values in vars(self).values():
            if isinstance(values, np.ndarray):
                values.flags.writeable = False

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
        names = ("starts", "lengths", "trained", "lines", "file", "truncated")
        part = replace(self, **{name: getattr(self, name)[chosen] for name in names})
        sums = {"truncated": part.truncated, "tokens": part.lengths, "trained_tokens": part.trained}
        counts: Any = {name: int(values.sum()) for name, values in sums.items()}
        part.stats = replace(self.stats, rows=len(chosen), **counts)
        return part

    def split(self, held_out: float | int, seed: int = 0) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Training and held-out rows, chosen by ``seed``, each in the order of the file; UserError if one is empty.

        ``held_out`` is a share of the rows below 1.0 (float), or their number (int).
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
    path: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    format: str | None = None,
    train_on: TrainOn = "answers",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    folder: str | Path | None = None,
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
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected None or one of {', '.join(FORMATS)}")
    encoder = ChatEncoder(tokenizer, max_length=max_length, train_on=train_on)
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    where = " + ".join(map(str, paths))
    formats = dict[str, None]()

    ids, labels = (_TokenArray(Path(folder or tempfile.gettempdir())) for _ in range(2))
    lengths = array("q")
    lines = array("q")
    dropped = array("q")
    trained = array("i")
    truncated = bytearray()
    too_long = bytearray()
    files = array("h")
    with_messages = False
    for number, each in enumerate(paths):
        rows = read_rows(each, limit=limit, columns=columns)
        first = list(islice(rows, FIRST_ROWS))
        name = format or infer_format(first, columns or ())
        formats[name] = None
        for source in chain(first, rows):
            row = normalize(source, name)
            with_messages |= row.messages is not None
            encoded = encoder.encode(row)
            if encoded.trained == 0:
                dropped.append(row.line)
                too_long.append(encoded.truncated > 0)
                continue
            ids.extend(encoded.input_ids)
            labels.extend(encoded.labels)
            lengths.append(len(encoded.input_ids))
            trained.append(encoded.trained)
            lines.append(row.line)
            files.append(number)
            truncated.append(encoded.truncated > 0)
    if not lengths:
        advice = "add assistant messages, or set train_on to 'all'"
        why = f"none of the {len(dropped)} rows has an answer to train on; {advice}"
        if any(too_long):
            late = f"{sum(too_long)} of {len(dropped)} rows begin their answer after max_length={max_length} tokens"
            why = f"no row has a trained token left, as {late}; raise max_length"
        raise UserError(f"{where}: {why}.")

    counts = np.array(lengths, dtype=np.int64)
    stats = DatasetStats(
        path=where,
        files={str(each): content_hash(each) for each in paths},
        format=" + ".join(formats),
        inferred=format is None,
        template=("default" if encoder.uses_default_template else "tokenizer") if with_messages else "none",
        max_length=max_length,
        train_on=train_on,
        rows=len(lengths),
        dropped=len(dropped),
        dropped_too_long=sum(too_long),
        truncated=sum(truncated),
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
        np.array(files, dtype=np.int16),
        np.array(truncated, dtype=bool),
        Dropped(np.array(dropped, dtype=np.int64), np.array(too_long, dtype=bool)),
        stats,
    )


class Section(Protocol):
    """What splitting asks of the section ``data`` of a config."""

    @property
    def train(self) -> str | list[str]: ...
    @property
    def eval(self) -> str | list[str] | None: ...
    @property
    def eval_fraction(self) -> float: ...
    def load(self, path: str | list[str], tokenizer: Any, **options: Any) -> TokenizedDataset: ...


def load_split(
    data: Section, tokenizer: Any, seed: int, **options: Any
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training rows and held-out rows (None if there are to be none) of the files that a config names."""
    rows = data.load(data.train, tokenizer, **options)
    if data.eval is not None:
        return rows, data.load(data.eval, tokenizer, **options)
    if data.eval_fraction == 0:
        return rows, None
    # A few rows still give a held-out loss: at least one is held out.
    held_out = max(1, round(data.eval_fraction * len(rows)))
    if held_out >= len(rows):
        raise UserError(
            f"{rows.stats.path} has {len(rows)} usable row: holding one out leaves none to learn from; "
            "add rows or set data.eval_fraction to 0"
        )
    return rows.split(held_out, seed=seed)


class _TokenArray:
    """int32 numbers, appended row by row: in memory at first, beyond CHUNK_BYTES in a file without a name, which
    vanishes with its last user, also after a crash, and is read through a memory map."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = array("i")
        self._file: IO[bytes] | None = None

    def extend(self, numbers: list[int]) -> None:
        self._last.extend(numbers)
        if len(self._last) * self._last.itemsize >= CHUNK_BYTES:
            self._write()

    def finish(self) -> np.ndarray:
        if self._file is None:
            return np.array(self._last, dtype=np.int32)
        self._write()
        with self._file:
            return np.memmap(self._file, dtype=np.int32, mode="r")

    def _write(self) -> None:
        with as_write_error(self._folder, "; the tokens of the data do not fit into memory, so make room there"):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed in finish()
            self._last.tofile(self._file)
            self._file.flush()
        del self._last[:]
