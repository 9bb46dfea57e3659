"""Which rows form which batch, in an order that a checkpoint can name by two integers, and padding rows to tensors."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from qlora_native.data.template import IGNORE_INDEX
from qlora_native.errors import UserError

# Rows are sorted by length within windows of this many batches, or of a quarter of the epoch if that is less: wide
# enough that neighbors are nearly equally long, narrow enough that which rows meet changes from epoch to epoch.
WINDOW_BATCHES = 32

Item = TypeVar("Item")  # of a batch: a row, or a sequence of rows packed together


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


class Plan(ABC, Generic[Item]):
    """The order of batches over epochs; its position is saved and restored.

    ``for batch in plan`` runs from the position to the end of the epoch and leaves the position at the start of the
    next; ``plan.forever()`` never ends. The position moves before a batch is handed out, so a state saved while working
    on a batch resumes with the one after it.

    The order is a pure function of the arguments and the epoch; no global random state is read. In epoch 0 the batch
    that needs most memory comes first: a setting too large for the machine fails in the first step.

    Args:
        lengths: tokens per row, [rows].
        batch_size: items per batch; the last ones of an epoch may form one smaller batch.
        seed: any integer; its last 64 bits count.
        epoch: the epoch to start in, from 0.

    Attributes:
        epoch, batch: the position: the epoch, and the index in it of the next batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.ndim != 1 or self._lengths.size == 0:
            raise ValueError(f"lengths has shape {list(self._lengths.shape)}, expected [rows] with at least one row")
        for name, value, least in (("batch_size", batch_size, 1), ("epoch", epoch, 0)):
            _check_least(name, value, least)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.batch = 0
        self._order: tuple[int, list[list[Item]]] | None = None

    @abstractmethod
    def _make(self, epoch: int) -> tuple[list[list[Item]], list[int]]:
        """The batches of one epoch before they are shuffled, and the tokens that each holds once it is padded."""

    @abstractmethod
    def _identity(self) -> dict[str, int]:
        """What the order depends on."""

    def count(self, epoch: int) -> int:
        """Batches in one epoch."""
        return len(self.batches(epoch))

    def steps(self, epochs: float) -> int:
        """Batches in so many epochs; a part of one is rounded up."""
        whole = int(epochs)
        rest = epochs - whole
        # 2.1 - 2 is a little more than 0.1, which must not make a step.
        last = math.ceil(rest * self.count(whole) - 1e-9) if rest else 0
        return sum(self.count(epoch) for epoch in range(whole)) + last

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
            self.epoch, self.batch = self.epoch + 1, 0
        return list(items)

    def state_dict(self) -> dict[str, int]:
        """The position and what the order depends on; plain integers, fit for JSON."""
        return {"epoch": self.epoch, "batch": self.batch, **self._all_identity()}

    def _all_identity(self) -> dict[str, int]:
        return {
            "rows": int(self._lengths.size),
            "lengths_crc32": zlib.crc32(self._lengths.astype("<i8").tobytes()),
            "batch_size": self.batch_size,
            "seed": self.seed,
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the position in ``state``.

        Raises:
            UserError: the state belongs to other data, another batch size, seed or kind of plan, so its position means
                nothing here.
            ValueError: ``state`` is not what :meth:`state_dict` gives.
        """
        here = self._all_identity()
        packed = ["on" if "packed_length" in identity else "off" for identity in (state, here)]
        if packed[0] != packed[1]:
            raise UserError(
                _not_resumed(f"packing was {packed[0]} when the checkpoint was made and is {packed[1]} now")
            )
        absent = [key for key in ("epoch", "batch", *here) if not isinstance(state.get(key), int)]
        if absent:
            raise ValueError(
                f"load_state_dict: no integer for {', '.join(absent)} in the state, got keys {sorted(state)}"
            )
        for key, value in here.items():
            if state[key] != value:
                if key == "lengths_crc32":
                    raise UserError(_not_resumed("the rows have other lengths than those the checkpoint was made with"))
                raise UserError(_not_resumed(f"{key} was {state[key]} when the checkpoint was made and is {value} now"))
        if state["epoch"] < 0 or not 0 <= state["batch"] < self.count(state["epoch"]):
            raise ValueError(
                f"load_state_dict: position is epoch {state['epoch']}, batch {state['batch']}, "
                f"expected an epoch from 0 and a batch below {self.count(max(0, state['epoch']))}"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]


def _not_resumed(why: str) -> str:
    return (
        f"the order of the data cannot be resumed: {why}; "
        "restore the data and the settings of that run, or start a new one without --resume."
    )


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")


class BatchPlan(Plan[int]):
    """A :class:`Plan` whose batches are rows of like length; a batch is a list of row indices.

    Args:
        lengths, batch_size, seed, epoch: see :class:`Plan`.
        window_batches: most batches that are sorted by length together; 1 turns grouping off.
        drop_last: leave out the smaller batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        *,
        window_batches: int = WINDOW_BATCHES,
        drop_last: bool = False,
    ) -> None:
        super().__init__(lengths, batch_size, seed, epoch)
        _check_least("window_batches", window_batches, 1)
        if drop_last and self._lengths.size < batch_size:
            raise ValueError(f"{self._lengths.size} rows make no batch of {batch_size} with drop_last=True")
        self.window_batches = window_batches
        self.drop_last = drop_last

    def __len__(self) -> int:
        """Batches per epoch."""
        rows = int(self._lengths.size)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def count(self, epoch: int) -> int:
        """Batches in one epoch: the same in all."""
        return len(self)

    def _make(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        rows = permutation(self._lengths.size, self.seed, epoch, 0)
        window = self.batch_size * min(self.window_batches, max(1, len(self) // 4))
        batches: list[list[int]] = []
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            part = part[np.argsort(-self._lengths[part], kind="stable")]
            batches += [part[at : at + self.batch_size].tolist() for at in range(0, len(part), self.batch_size)]
        if self.drop_last and len(batches[-1]) < self.batch_size:
            batches.pop()
        return batches, [len(rows) * int(self._lengths[rows].max()) for rows in batches]

    def _identity(self) -> dict[str, int]:
        return {"window_batches": self.window_batches, "drop_last": int(self.drop_last)}


def collate(
    rows: Sequence[Mapping[str, Sequence[int] | np.ndarray]], pad_id: int, pad_to_multiple: int = 8
) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest, rounded up to ``pad_to_multiple`` tokens.

    Args:
        rows: B mappings with ``input_ids`` and ``labels``, each [length].
        pad_id: the id written into ``input_ids`` behind a row; its label is -100 and its attention 0.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask``: int64 [B, T].
    """
    if not rows:
        raise ValueError("collate: got no rows, expected at least one")
    if pad_to_multiple < 1:
        raise ValueError(f"collate: pad_to_multiple is {pad_to_multiple}, expected at least 1")
    longest = max(len(row["input_ids"]) for row in rows)
    width = -(-longest // pad_to_multiple) * pad_to_multiple
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        if len(row["labels"]) != length:
            raise ValueError(f"collate: row {index} has {length} input_ids but {len(row['labels'])} labels")
        input_ids[index, :length] = row["input_ids"]
        labels[index, :length] = row["labels"]
        attention_mask[index, :length] = 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(attention_mask),
    }
