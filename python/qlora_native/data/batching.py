"""The order of batches, resumable from a few integers in a checkpoint; padding and packing rows into tensors.

Packing lays whole rows end to end into sequences of one length, so that next to nothing is padding. There is no
attention across rows: positions count from 0 in each row, which is how the model finds where one ends, and the first
token of each has no label. Losses and gradients are those of the rows on their own.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from qlora_native.data.template import IGNORE_INDEX
from qlora_native.errors import UserError

# Rows are sorted by length within windows of this many batches, or of a quarter of the epoch if that is less: wide
# enough that neighbors are nearly equally long, narrow enough that which rows meet changes from epoch to epoch.
WINDOW_BATCHES = 32
# Rows that are packed together: enough that what stays empty is a sequence in a hundred, few enough that a row's
# neighbors change from epoch to epoch, and that packing takes no longer for a row of a large file than of a small one.
WINDOW_ROWS = 1024

Item = TypeVar("Item")  # of a batch: a row, or a sequence of rows packed together
Lengths = Sequence[int] | np.ndarray  # tokens of each row
TokenizedRow = Mapping[str, Sequence[int] | np.ndarray]  # "input_ids" and "labels", each [length]


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of ``range(size)``, int64 [size], the same on every machine and under every version of numpy.

    numpy promises no stable streams across its versions, so a resumed run could meet its rows in another order; this
    sorts by the splitmix64 hash (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
    of the position, started from ``key``.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.uint64(part % 2**64))
    return np.argsort(_splitmix64(state + np.arange(size, dtype=np.uint64)), kind="stable")


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


Mix = tuple[np.ndarray, Sequence[float]]  # the number of each row's file, int [rows], and each file's weight


def mixed_rows(mix: Mix, seed: int, epoch: int) -> np.ndarray:
    """As many rows as there are, int64 [rows], of each file a share like its weight. A file goes on where the epoch
    before ended: each of its rows is taken once, in a random order, before one is taken again."""
    file, weights = mix
    parts = []
    ends = np.rint(np.cumsum(weights) / sum(weights) * len(file)).astype(np.int64)
    for number, count in enumerate(np.diff(ends, prepend=0).tolist()):
        rows = np.flatnonzero(file == number)
        begin = epoch * count  # of all that this file gives over the epochs
        passes = range(begin // len(rows), -(-(begin + count) // len(rows)))
        orders = [rows[permutation(len(rows), seed, each, number, 3)] for each in passes]
        taken = np.concatenate([rows[:0], *orders])
        start = begin - passes.start * len(rows)
        parts.append(taken[start : start + count])
    return np.concatenate(parts)


class Sampler(ABC, Generic[Item]):
    """The order of batches over epochs; its position, ``epoch`` and ``batch``, is saved and restored.

    ``for batch in sampler`` runs from the position to the end of the epoch and leaves the position at the start of the
    next; ``sampler.forever()`` never ends. The position moves before a batch is yielded, so a state saved while working
    on a batch resumes with the one after it. The last batch of an epoch may be smaller.

    The order is a pure function of the arguments and the epoch; no global random state is read. In epoch 0 the batch
    that needs most memory comes first: a setting too large for the machine fails in the first step.

    ``settings`` are whatever else the order depends on.
    """

    mix: Mix | None = None  # of the rows of an epoch; without it, every row once

    def __init__(self, lengths: Lengths, batch_size: int, seed: int, epoch: int, **settings: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.ndim != 1 or self._lengths.size == 0:
            raise ValueError(f"lengths has shape {list(self._lengths.shape)}, expected [rows] with at least one row")
        for name, value, least in (("batch_size", batch_size, 1), ("epoch", epoch, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.batch = 0
        self._settings = settings
        self._order: tuple[int, list[list[Item]]] | None = None

    @abstractmethod
    def _make(self, epoch: int) -> tuple[list[list[Item]], list[int]]:
        """The batches of one epoch before they are shuffled, and the tokens of each with padding."""

    def batches(self, epoch: int) -> list[list[Item]]:
        """All batches of one epoch; the position stays."""
        if self._order is None or self._order[0] != epoch:
            batches, costs = self._make(epoch)
            order = permutation(len(batches), self.seed, epoch, 1).tolist()
            if epoch == 0:
                largest = max(range(len(batches)), key=costs.__getitem__)
                order.remove(largest)
                order.insert(0, largest)
            self._order = (epoch, [batches[index] for index in order])
        return self._order[1]

    def _shuffled(self, epoch: int) -> np.ndarray:
        rows = np.arange(self._lengths.size) if self.mix is None else mixed_rows(self.mix, self.seed, epoch)
        return rows[permutation(len(rows), self.seed, epoch, 0)]

    def count(self, epoch: int) -> int:
        """Batches in one epoch."""
        return len(self.batches(epoch))

    def steps(self, epochs: float) -> int:
        """Batches in so many epochs; a part of one is rounded up."""
        whole = int(epochs)
        rest = epochs % 1
        # 2.1 - 2 is a little more than 0.1, which must not make a step.
        last = math.ceil(rest * self.count(whole) - 1e-9) if rest else 0
        return sum(self.count(epoch) for epoch in range(whole)) + last

    def __iter__(self) -> Iterator[list[Item]]:
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    def forever(self) -> Iterator[list[Item]]:
        """Batches from the position on, epoch after epoch, without end."""
        while True:
            yield self._next()

    def _next(self) -> list[Item]:
        items = self.batches(self.epoch)[self.batch]
        self.batch += 1
        if self.batch == self.count(self.epoch):
            self.epoch = self.epoch + 1
            self.batch = 0
        return list(items)

    def state_dict(self) -> dict[str, int]:
        """The position and what the order depends on; plain integers, fit for JSON."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def _identity(self) -> dict[str, int]:
        crc32 = zlib.crc32(self._lengths.astype("<i8").tobytes())
        for part in self.mix or ():
            crc32 = zlib.crc32(np.asarray(part, dtype="<f8").tobytes(), crc32)
        rows = {"rows": int(self._lengths.size), "lengths_crc32": crc32}
        return {**rows, "batch_size": self.batch_size, "seed": self.seed, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position in ``state``.

        UserError if it belongs to other data, another batch size, seed or kind of sampler; ValueError if it is not what
        :meth:`state_dict` gives.
        """
        here = self._identity()
        then, now = ("on" if "packed_length" in identity else "off" for identity in (state, here))
        if then != now:
            raise _not_resumed(f"packing was {then} when the checkpoint was made and is {now} now")
        absent = [key for key in ("epoch", "batch", *here) if not isinstance(state.get(key), int)]
        if absent:
            raise ValueError(
                f"load_state_dict: no integer for {', '.join(absent)} in the state, got keys {sorted(state)}"
            )
        for key, value in here.items():
            if state[key] != value:
                why = f"{key} was {state[key]} when the checkpoint was made and is {value} now"
                lengths = "the rows have other lengths, or their files other weights, than when the checkpoint was made"
                raise _not_resumed(lengths if key == "lengths_crc32" else why)
        if state["epoch"] < 0 or not 0 <= state["batch"] < self.count(state["epoch"]):
            raise ValueError(
                f"load_state_dict: position is epoch {state['epoch']}, batch {state['batch']}, "
                f"expected an epoch from 0 and a batch below {self.count(max(0, state['epoch']))}"
            )
        self.epoch = state["epoch"]
        self.batch = state["batch"]


def _not_resumed(why: str) -> UserError:
    return UserError(
        f"the order of the data cannot be resumed: {why}; "
        "restore the data and the settings of that run, or start a new one without --resume."
    )


class BatchSampler(Sampler[int]):
    """Batches of rows of like length, each a list of row indices.

    At most ``window_batches`` batches are sorted by length together; 1 turns grouping off.
    """

    def __init__(
        self, lengths: Lengths, batch_size: int, seed: int = 0, epoch: int = 0, *, window_batches: int = WINDOW_BATCHES
    ) -> None:
        # Checkpoints of earlier versions hold drop_last too.
        super().__init__(lengths, batch_size, seed, epoch, window_batches=window_batches, drop_last=0)
        if window_batches < 1:
            raise ValueError(f"window_batches is {window_batches}, expected at least 1")
        self.window_batches = window_batches

    def count(self, epoch: int) -> int:
        """Batches in one epoch: the same in all."""
        return -(-int(self._lengths.size) // self.batch_size)

    def _make(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        rows = self._shuffled(epoch)
        window = self.batch_size * min(self.window_batches, max(1, self.count(epoch) // 4))
        batches: list[list[int]] = []
        for start in range(0, len(rows), window):
            part = _longest_first(self._lengths, rows[start : start + window])
            batches += _parts(part.tolist(), self.batch_size)
        return batches, [len(rows) * int(np.max(self._lengths[rows])) for rows in batches]


class PackedBatchSampler(Sampler[list[int]]):
    """Batches of sequences of at most ``packed_length`` tokens, each a list of row indices.

    How many batches an epoch has may differ by a few from epoch to epoch.
    """

    def __init__(self, lengths: Lengths, batch_size: int, packed_length: int, seed: int = 0, epoch: int = 0) -> None:
        super().__init__(lengths, batch_size, seed, epoch, packed_length=packed_length)
        if (longest := int(np.max(self._lengths))) > packed_length:
            raise ValueError(f"packed_length is {packed_length}, expected at least the longest row's {longest} tokens")
        self.packed_length = packed_length

    def _make(self, epoch: int) -> tuple[list[list[list[int]]], list[int]]:
        sequences = pack(self._lengths, self._shuffled(epoch), self.packed_length)
        # Windows end in emptier sequences; shuffled, they spread over the batches.
        mixed = [sequences[at] for at in permutation(len(sequences), self.seed, epoch, 2)]
        batches = _parts(mixed, self.batch_size)
        longest = [max(int(self._lengths[rows].sum()) for rows in batch) for batch in batches]
        return batches, [len(batch) * length for batch, length in zip(batches, longest, strict=True)]


def _parts(items: list[Item], size: int) -> list[list[Item]]:
    """Lists of ``size`` items; the last may have fewer."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def _longest_first(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int, window_rows: int = WINDOW_ROWS) -> list[list[int]]:
    """Whole rows into sequences of at most ``capacity`` tokens, each a list of row indices.

    Best fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973) over windows of ``order``, int64 [rows]:
    the longest row first, each into the fullest sequence that has room for it.
    """
    sequences: list[list[int]] = []
    for start in range(0, len(order), window_rows):
        part = _longest_first(lengths, order[start : start + window_rows])
        rooms: list[tuple[int, int]] = []  # (tokens free, sequence), sorted
        for row, length in zip(part.tolist(), lengths[part].tolist(), strict=True):
            if length > capacity:
                raise ValueError(f"row {row} has {length} tokens, more than the {capacity} of a sequence")
            at = bisect_left(rooms, (length, -1))
            if at == len(rooms):
                room = capacity
                sequence = len(sequences)
                sequences.append([])
            else:
                room, sequence = rooms.pop(at)
            sequences[sequence].append(row)
            if room > length:
                insort(rooms, (room - length, sequence))
    return sequences


def evaluation_order(lengths: np.ndarray, capacity: int | None) -> list[int] | list[list[int]]:
    """All rows once, longest first, which leaves little padding; packed if there is a ``capacity``."""
    longest_first = _longest_first(lengths, np.arange(len(lengths)))
    return longest_first.tolist() if capacity is None else pack(lengths, longest_first, capacity)


def collate(rows: Sequence[TokenizedRow], pad_id: int, pad_to_multiple: int = 8) -> dict[str, torch.Tensor]:
    """Pad B rows on the right to the longest, rounded up to ``pad_to_multiple`` tokens; padding has the label -100.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask``: int64 [B, T].
    """
    input_ids, labels, _ = _lay_out([[row] for row in rows], pad_id, pad_to_multiple)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def collate_packed(
    sequences: Sequence[Sequence[TokenizedRow]], pad_id: int, pad_to_multiple: int = 8
) -> dict[str, torch.Tensor]:
    """Lay the rows of each of B sequences end to end, and pad as :func:`collate` does.

    There is no attention mask: models of transformers read where rows begin off the positions, if they get no mask.
    Padding counts as a row of its own.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``: int64 [B, T].
    """
    input_ids, labels, position_ids = _lay_out(sequences, pad_id, pad_to_multiple)
    labels[position_ids == 0] = IGNORE_INDEX  # or the row before would predict it
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _lay_out(
    sequences: Sequence[Sequence[TokenizedRow]], pad_id: int, pad_to_multiple: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and positions within rows, each int64 [B, T], of rows end to end and padding behind them."""
    if not sequences or not all(sequences):
        raise ValueError("collate: got no rows, expected at least one in each sequence")
    if pad_to_multiple < 1:
        raise ValueError(f"collate: pad_to_multiple is {pad_to_multiple}, expected at least 1")
    longest = max(sum(len(row["input_ids"]) for row in rows) for rows in sequences)
    width = -(-longest // pad_to_multiple) * pad_to_multiple
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    labels = np.full((len(sequences), width), IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros((len(sequences), width), dtype=np.int64)
    for index, rows in enumerate(sequences):
        start = 0
        for row in rows:
            length = len(row["input_ids"])
            end = start + len(row["input_ids"])
            if len(row["labels"]) != length:
                raise ValueError(f"collate: row {index} has {length} input_ids but {len(row['labels'])} labels")
            input_ids[index, start:end] = row["input_ids"]
            labels[index, start:end] = row["labels"]
            positions[index, start:end] = np.arange(length)
            start = end
        positions[index, start:] = np.arange(width - start)
    return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions)
