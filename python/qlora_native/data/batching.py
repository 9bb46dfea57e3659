"""The order of batches, resumable from a few integers in a checkpoint; padding and packing rows into tensors.

Packing lays whole rows end to end into sequences of one length, so that next to nothing is padding. There is no
attention across rows: positions count from 0 in each row, which is how the model finds where one ends, and the first
token of each has no label. Losses and gradients are those of the rows on their own.
"""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from operator import index
from types import MappingProxyType
from typing import Any

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
MULTIPLE = 8  # of the tokens of a line of a batch

# What a step learns from: numbers of rows, or lists of those that are packed into one sequence.
Items = list[Any]
Batch = dict[str, torch.Tensor]  # what a model takes at a time: a micro-batch
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


# The number of each row's file, int [rows], and each file's weight.
Mix = tuple[np.ndarray, Sequence[float]]


def mixed_rows(mix: Mix, seed: int, epoch: int) -> np.ndarray:
    """As many rows as there are, int64 [rows], of each file a share like its weight. A file goes on where the epoch
    before ended: each of its rows is taken once, in a random order, before one is taken again."""
    file, weights = mix
    parts = []
    ends = np.rint(np.cumsum(weights) / sum(weights) * len(file)).astype(np.int64)
    for number, count in enumerate(np.diff(ends, prepend=0).tolist()):
        rows = np.flatnonzero(file == number)
        begin = epoch * count  # of all that this file gives over the epochs
        passes = range(begin // len(rows), (begin + count) // len(rows) + 1)
        taken = np.concatenate(
            [rows[permutation(len(rows), seed, each, number, 3)] for each in passes]
        )
        parts.append(taken[begin % len(rows) :][:count])
    return np.concatenate(parts)


class Sampler(Iterator[Items]):
    """An iterator over the batches of one epoch after another, without end; its position, ``epoch`` and ``batch``, is
    saved and restored.

    The position moves before a batch is returned, so a state saved while working on a batch resumes with the one after
    it. The last batch of an epoch may be smaller.

    The order is a pure function of the arguments and the epoch; no global random state is read. In epoch 0 the batch
    that needs most memory comes first: a setting too large for the machine fails in the first step.
    """

    mix: Mix | None = None  # of the rows of an epoch; without it, every row once
    settings: Mapping[str, int]  # whatever else the order depends on

    def __init__(self, lengths: Lengths, batch_size: int, seed: int = 0) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.batch = 0
        self._order: tuple[int, list[Items]] = (-1, [])  # an epoch and its batches

    @abstractmethod
    def _make(self, epoch: int) -> list[Items]:
        """The batches of one epoch before they are shuffled."""

    def batches(self, epoch: int) -> list[Items]:
        """All batches of one epoch; the position stays."""
        if self._order[0] != epoch:
            batches = self._make(epoch)
            order = permutation(len(batches), self.seed, epoch, 1).tolist()
            if epoch == 0:
                largest = max(range(len(batches)), key=lambda at: self._tokens(batches[at]))
                order.remove(largest)
                order.insert(0, largest)
            self._order = (epoch, [batches[at] for at in order])
        return self._order[1]

    def _tokens(self, items: Items) -> int:
        """Tokens of a batch with its padding."""
        return len(items) * max(int(self._lengths[item].sum()) for item in items)

    def _shuffled(self, epoch: int) -> np.ndarray:
        rows = (
            np.arange(self._lengths.size)
            if self.mix is None
            else mixed_rows(self.mix, self.seed, epoch)
        )
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

    def __next__(self) -> Items:
        """The batch at the position, which moves on: behind the last of an epoch comes the first of the next one."""
        items = self.batches(self.epoch)[self.batch]
        self.batch += 1
        if self.batch == self.count(self.epoch):
            self.epoch += 1
            self.batch = 0
        return list(items)

    def state_dict(self) -> dict[str, int]:
        """The position and what the order depends on; plain integers, fit for JSON."""
        crc32 = zlib.crc32(self._lengths.astype("<i8").tobytes())
        for part in self.mix or ():
            crc32 = zlib.crc32(np.asarray(part, dtype="<f8").tobytes(), crc32)
        rows = {"rows": int(self._lengths.size), "lengths_crc32": crc32}
        own = {"batch_size": self.batch_size, "seed": self.seed, **self.settings}
        return {"epoch": self.epoch, "batch": self.batch, **rows, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position in ``state``.

        UserError if it belongs to other data, another batch size, seed or kind of sampler; KeyError, TypeError or
        ValueError if it is not what :meth:`state_dict` gives.
        """
        # The kinds of sampler have other keys, so whether rows are packed is compared first.
        states = (state, self.state_dict())
        then, now = ({"packing": "on" if "packed_length" in one else "off", **one} for one in states)
        for key, value in now.items():
            if key not in ("epoch", "batch") and then[key] != value:
                why = f"{key} was {then[key]} when the checkpoint was made and is {value} now"
                if key == "lengths_crc32":
                    why = "the rows have other lengths, or their files other weights, than when the checkpoint was made"
                raise UserError(
                    f"the order of the data cannot be resumed: {why}; "
                    "restore the data and the settings of that run, or start a new one without --resume."
                )
        epoch = index(state["epoch"])
        batch = index(state["batch"])
        if epoch < 0 or not 0 <= batch < self.count(epoch):
            raise ValueError(f"load_state_dict: epoch {epoch} has no batch {batch}")
        self.epoch = epoch
        self.batch = batch


class BatchSampler(Sampler):
    """Batches of rows of like length, each a list of row indices."""

    # The settings are those that earlier versions had.
    settings = MappingProxyType({"window_batches": WINDOW_BATCHES, "drop_last": 0})

    def count(self, epoch: int) -> int:
        """Batches in one epoch: the same in all."""
        return -(-int(self._lengths.size) // self.batch_size)

    def _make(self, epoch: int) -> list[Items]:
        rows = self._shuffled(epoch)
        window = self.batch_size * min(WINDOW_BATCHES, max(1, self.count(epoch) // 4))
        parts = (
            _longest_first(self._lengths, rows[at : at + window]) for at in range(0, len(rows), window)
        )
        return [batch for part in parts for batch in _parts(part.tolist(), self.batch_size)]


class PackedBatchSampler(Sampler):
    """Batches of sequences of at most ``packed_length`` tokens, each a list of row indices.

    How many batches an epoch has may differ by a few from epoch to epoch.
    """

    def __init__(self, lengths: Lengths, batch_size: int, packed_length: int, seed: int = 0) -> None:
        super().__init__(lengths, batch_size, seed)
        self.settings = {"packed_length": packed_length}

    def _make(self, epoch: int) -> list[Items]:
        sequences = pack(self._lengths, self._shuffled(epoch), self.settings["packed_length"])
        # Windows end in emptier sequences; shuffled, they spread over the batches.
        mixed = [sequences[at] for at in permutation(len(sequences), self.seed, epoch, 2)]
        return _parts(mixed, self.batch_size)


def _parts(items: list[Any], size: int) -> list[Items]:
    """Lists of ``size`` items; the last may have fewer."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def _longest_first(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Whole rows into sequences of at most ``capacity`` tokens, each a list of row indices.

    Best fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973) over windows of ``order``, int64 [rows]:
    the longest row first, each into the fullest sequence that has room for it.
    """
    sequences: list[list[int]] = []
    for start in range(0, len(order), WINDOW_ROWS):
        part = _longest_first(lengths, order[start : start + WINDOW_ROWS])
        rooms: list[tuple[int, int]] = []  # (tokens free, sequence), sorted
        for row, length in zip(part.tolist(), lengths[part].tolist(), strict=True):
            at = bisect_left(rooms, (length, -1))
            if at == len(rooms):
                rooms.append((capacity, len(sequences)))
                sequences.append([])
            room, sequence = rooms.pop(at)
            sequences[sequence].append(row)
            if room > length:
                insort(rooms, (room - length, sequence))
    return sequences


def evaluation_order(lengths: np.ndarray, capacity: int | None) -> Items:
    """All rows once, longest first, which leaves little padding; packed if there is a ``capacity``."""
    longest_first = _longest_first(lengths, np.arange(len(lengths)))
    return longest_first.tolist() if capacity is None else pack(lengths, longest_first, capacity)


def micro_batches(
    rows: Sequence[TokenizedRow], items: Items, batch_size: int, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """The items of one step, ``batch_size`` at a time, as tensors on ``device``."""
    for at in range(0, len(items), batch_size):
        part: Any = items[at : at + batch_size]
        if isinstance(part[0], list):
            batch = collate_packed([[rows[number] for number in item] for item in part], pad_id)
        else:
            batch = collate([rows[number] for number in part], pad_id)
        yield {key: value.to(device) for key, value in batch.items()}


def collate(rows: Sequence[TokenizedRow], pad_id: int) -> Batch:
    """Pad B rows on the right to the longest, rounded up to a multiple of 8 tokens; padding has the label -100.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask``: int64 [B, T].
    """
    batch = _lay_out([[row] for row in rows], pad_id)
    positions = batch.pop("position_ids")  # which restart where padding begins
    return {**batch, "attention_mask": (positions == torch.arange(positions.shape[1])).long()}


def collate_packed(sequences: Sequence[Sequence[TokenizedRow]], pad_id: int) -> Batch:
    """Lay the rows of each of B sequences end to end, and pad as :func:`collate` does.

    There is no attention mask: models of transformers read where rows begin off the positions, if they get no mask.
    Padding counts as a row of its own.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``: int64 [B, T].
    """
    batch = _lay_out(sequences, pad_id)
    batch["labels"][batch["position_ids"] == 0] = IGNORE_INDEX  # or the row before would predict it
    return batch


def _lay_out(sequences: Sequence[Sequence[TokenizedRow]], pad_id: int) -> Batch:
    """Token ids, labels and positions within rows, each int64 [B, T], of rows end to end and padding behind them."""
    lengths = [sum(len(row["input_ids"]) for row in rows) for rows in sequences]
    width = -(-max(lengths) // MULTIPLE) * MULTIPLE
    laid: list[TokenizedRow] = []
    for rows, length in zip(sequences, lengths, strict=True):
        padding = {
            "input_ids": np.full(width - length, pad_id),
            "labels": np.full(width - length, IGNORE_INDEX),
        }
        laid += [*rows, padding]
    parts: dict[str, list[Any]] = {key: [row[key] for row in laid] for key in ("input_ids", "labels")}
    parts["position_ids"] = [np.arange(len(ids)) for ids in parts["input_ids"]]
    return {
        key: torch.from_numpy(np.concatenate(part, dtype=np.int64)).view(-1, width)
        for key, part in parts.items()
    }
