"""Packing: whole rows laid end to end into sequences of one length, so that next to nothing is padding.

Rows of a sequence do not see each other: each one's positions count from 0, which is how the model tells where one ends
(the loss and its gradients are those of the rows on their own), and the first token of each has no label.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qlora_native.data.batching import Plan, permutation
from qlora_native.data.template import IGNORE_INDEX

# Rows that are packed together: enough that what stays empty is a sequence in a hundred, few enough that a row's
# neighbors change from epoch to epoch, and that packing takes no longer for a row of a large file than of a small one.
WINDOW_ROWS = 1024


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int, window_rows: int = WINDOW_ROWS) -> list[list[int]]:
    """Whole rows into sequences of at most ``capacity`` tokens, each a list of row indices.

    Best fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973) over windows of ``order``: the longest
    row first, each into the fullest sequence that has room for it.

    Args:
        lengths: int64 [rows], from 1 to ``capacity``.
        order: int64 [rows], the rows in the order in which windows are taken.
    """
    sequences: list[list[int]] = []
    for start in range(0, len(order), window_rows):
        part = order[start : start + window_rows]
        part = part[np.argsort(-lengths[part], kind="stable")]
        rooms: list[tuple[int, int]] = []  # (tokens free, sequence), sorted
        for row, length in zip(part.tolist(), lengths[part].tolist(), strict=True):
            if length > capacity:
                raise ValueError(f"row {row} has {length} tokens, more than the {capacity} of a sequence")
            at = bisect_left(rooms, (length, -1))
            if at == len(rooms):
                room, sequence = capacity, len(sequences)
                sequences.append([])
            else:
                room, sequence = rooms.pop(at)
            sequences[sequence].append(row)
            if room > length:
                insort(rooms, (room - length, sequence))
    return sequences


def evaluation_order(lengths: np.ndarray, capacity: int | None) -> list[int] | list[list[int]]:
    """All rows once, longest first, which leaves little padding; packed if there is a ``capacity``."""
    longest_first = np.argsort(-lengths, kind="stable")
    return longest_first.tolist() if capacity is None else pack(lengths, longest_first, capacity)


class PackedPlan(Plan[list[int]]):
    """A :class:`Plan` whose batches are packed sequences, each a list of row indices.

    How many batches an epoch has may differ by a few from epoch to epoch.

    Args:
        lengths, seed, epoch: see :class:`Plan`.
        batch_size: sequences per batch.
        packed_length: tokens that a sequence holds at most.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        packed_length: int,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(lengths, batch_size, seed, epoch)
        if (longest := int(self._lengths.max())) > packed_length:
            raise ValueError(f"packed_length is {packed_length}, expected at least the longest row's {longest} tokens")
        self.packed_length = packed_length

    def _make(self, epoch: int) -> tuple[list[list[list[int]]], list[int]]:
        order = permutation(self._lengths.size, self.seed, epoch, 0)
        sequences = pack(self._lengths, order, self.packed_length)
        # Windows end in emptier sequences; shuffled, they spread over the batches.
        mixed = [sequences[at] for at in permutation(len(sequences), self.seed, epoch, 2)]
        batches = [mixed[at : at + self.batch_size] for at in range(0, len(mixed), self.batch_size)]
        costs = [len(batch) * max(int(self._lengths[rows].sum()) for rows in batch) for batch in batches]
        return batches, costs

    def _identity(self) -> dict[str, int]:
        return {"packed_length": self.packed_length}


def collate_packed(
    sequences: Sequence[Sequence[Mapping[str, Sequence[int] | np.ndarray]]], pad_id: int, pad_to_multiple: int = 8
) -> dict[str, torch.Tensor]:
    """Lay the rows of each sequence end to end, and pad to the longest, rounded up to ``pad_to_multiple`` tokens.

    There is no attention mask: models of transformers take positions that start again for another row, given they get
    no mask. Padding counts as a row of its own.

    Args:
        sequences: B lists of mappings with ``input_ids`` and ``labels``, each [length].
        pad_id: the id written behind the last row; its label is -100.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``: int64 [B, T].
    """
    if not sequences or not all(sequences):
        raise ValueError("collate_packed: got no rows, expected at least one in each sequence")
    longest = max(sum(len(row["input_ids"]) for row in rows) for rows in sequences)
    width = -(-longest // pad_to_multiple) * pad_to_multiple
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    labels = np.full((len(sequences), width), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros((len(sequences), width), dtype=np.int64)
    for index, rows in enumerate(sequences):
        at = 0
        for row in rows:
            end = at + len(row["input_ids"])
            input_ids[index, at:end] = row["input_ids"]
            labels[index, at:end] = row["labels"]
            labels[index, at] = IGNORE_INDEX  # or the row before would be asked for it
            position_ids[index, at:end] = np.arange(end - at)
            at = end
        position_ids[index, at:] = np.arange(width - at)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
    }
