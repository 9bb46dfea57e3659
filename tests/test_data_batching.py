"""The order of batches: complete, grouped by length, the same everywhere, and resumable at any batch."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from qlora_native.data import batching
from qlora_native.data.batching import BatchSampler, PackedBatchSampler, Sampler, collate, mixed_rows, permutation
from qlora_native.errors import UserError


def lengths(rows: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, 1000) for _ in range(rows)]


def padding(batches: list[list[int]], sizes: list[int]) -> int:
    return sum(len(rows) * max(sizes[row] for row in rows) - sum(sizes[row] for row in rows) for rows in batches)


# ---- the order


def splitmix64(state: int) -> int:
    """One output of the published generator, in Python's integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_permutation_is_that_of_the_published_hash() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "the first output for seed 0 that reference implementations print"
    start = splitmix64(splitmix64(0 ^ 7) ^ 3)
    expected = sorted(range(50), key=lambda at: splitmix64((start + at) % 2**64))
    assert permutation(50, 7, 3).tolist() == expected


def test_permutations_differ_by_key_and_hold_every_position() -> None:
    orders = [tuple(permutation(40, *key)) for key in ((0,), (1,), (-1,), (2**63,), (0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert permutation(0, 1).tolist() == []


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 8), (64, 4), (1001, 4), (1001, 7)])
def test_every_row_once_per_epoch_and_another_order_in_the_next(rows: int, size: int) -> None:
    sampler = BatchSampler(lengths(rows), size, seed=3)
    epochs = [sampler.batches(epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(rows))
        assert len(batches) == sampler.count(0) == -(-rows // size)
        assert sum(len(batch) < size for batch in batches) == (rows % size > 0)
    if rows > 10:
        assert epochs[1] != epochs[2]
        assert {frozenset(batch) for batch in epochs[1]} != {frozenset(batch) for batch in epochs[2]}, "rows mix anew"


def test_same_seed_and_epoch_give_the_same_order_whatever_the_global_generators_do() -> None:
    states: list[Callable[[], Any]] = [lambda: torch.get_rng_state().tolist(), np.random.get_state, random.getstate]
    before = [repr(state()) for state in states]
    order = BatchSampler(lengths(500), 4, seed=9).batches(2)
    assert [repr(state()) for state in states] == before
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(2)
    assert BatchSampler(np.array(lengths(500)), 4, seed=9).batches(2) == order
    assert BatchSampler(lengths(500), 4, seed=8).batches(2) != order


def test_the_order_of_a_small_epoch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkpoint holds a position only, so this order must never change. A window is at most a quarter of the epoch.
    sizes = [5, 1, 9, 3, 7, 2, 8, 4, 6, 10, 11, 15, 13, 12, 14, 17, 16, 19, 18, 22, 21, 20, 23]
    expected = [[22, 21, 2], [4, 0, 1], [6, 8, 7], [20, 11, 9], [17, 18, 16], [14, 5], [19, 15, 12], [13, 10, 3]]
    for window in (batching.WINDOW_BATCHES, 2):
        monkeypatch.setattr(batching, "WINDOW_BATCHES", window)
        assert BatchSampler(sizes, 3, seed=4).batches(1) == expected


def test_grouping_by_length_saves_most_of_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = lengths(2000)
    grouped = BatchSampler(sizes, 8, seed=1).batches(1)
    monkeypatch.setattr(batching, "WINDOW_BATCHES", 1)
    ungrouped = BatchSampler(sizes, 8, seed=1).batches(1)
    assert padding(grouped, sizes) < 0.1 * padding(ungrouped, sizes)
    longest = [max(sizes[row] for row in batch) for batch in grouped]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.4 < rises / len(longest) < 0.6, "batches come in no order of length"


def test_the_first_batch_of_all_needs_the_most_memory() -> None:
    sizes = lengths(1003)
    sampler = BatchSampler(sizes, 4, seed=2)
    costs = [len(batch) * max(sizes[row] for row in batch) for batch in sampler.batches(0)]
    assert costs[0] == max(costs) and costs[1:] != sorted(costs[1:], reverse=True)


# ---- the position


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_epochs_follow_each_other_and_go_on_after_any_batch(done: int) -> None:
    def sampler() -> BatchSampler:
        return BatchSampler(lengths(11), 4, seed=5)

    whole = [batch for epoch in range(4) for batch in sampler().batches(epoch)]
    first, resumed = sampler(), sampler()
    seen = list(islice(first, done))
    saved = json.loads(json.dumps(first.state_dict()))
    assert (first.epoch, first.batch) == (saved["epoch"], saved["batch"]) == divmod(done, 3)
    resumed.load_state_dict(saved)
    assert seen + list(islice(resumed, 12 - done)) == whole
    next(resumed).clear()  # a batch handed out is the caller's own
    assert sum(map(len, resumed.batches(4))) == 11


@pytest.mark.parametrize(
    ("sampler", "settings", "following"),
    [
        (BatchSampler([5, 1, 9, 3, 7], 2, seed=4), {"batch_size": 2, "window_batches": 32, "drop_last": 0}, [4, 0]),
        (PackedBatchSampler([5, 1, 9, 3, 7], 1, 10, seed=4), {"batch_size": 1, "packed_length": 10}, [[0]]),
    ],
)
def test_the_state_in_checkpoints_is_pinned(sampler: Any, settings: dict[str, int], following: Any) -> None:
    state = {"epoch": 1, "batch": 1, "rows": 5, "lengths_crc32": 399904241, "seed": 4, **settings}
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    assert next(sampler) == following


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (BatchSampler(lengths(12), 4, seed=5), "rows was 11 .* 12 now"),
        (BatchSampler(lengths(11), 2, seed=5), "batch_size was 4 .* 2 now"),
        (BatchSampler(lengths(11), 4, seed=6), "seed was 5 .* 6 now"),
        (BatchSampler(lengths(11, seed=1), 4, seed=5), "other lengths"),
        (PackedBatchSampler(lengths(11), 4, 1000, seed=5), "packing was off .* on now"),
    ],
)
def test_a_position_in_other_data_is_refused(other: BatchSampler, match: str) -> None:
    with pytest.raises(UserError, match=f"{match}.*--resume"):
        other.load_state_dict(BatchSampler(lengths(11), 4, seed=5).state_dict())
    assert (other.epoch, other.batch) == (0, 0)


def test_a_broken_state_is_refused() -> None:
    sampler = BatchSampler(lengths(11), 4)
    wrong: list[dict[str, Any]] = [{"batch": None}, {"batch": 0.5}, {"epoch": "0"}]
    for broken in wrong:
        with pytest.raises(TypeError):
            sampler.load_state_dict({**sampler.state_dict(), **broken})
    with pytest.raises(KeyError):
        sampler.load_state_dict({"epoch": 0, "batch": 0})
    for broken in ({"batch": 3}, {"batch": -1}, {"epoch": -1}):
        with pytest.raises(ValueError, match=r"epoch -?\d has no batch"):
            sampler.load_state_dict({**sampler.state_dict(), **broken})


# ---- several files with weights

LENGTHS = np.arange(3, 23)
FILE = np.repeat([0, 1, 2], [12, 5, 3])  # of 20 rows
WEIGHTS = [1, 2, 1]  # 5, 10 and 5 rows an epoch


def test_an_epoch_has_each_files_share_and_every_row_comes_before_one_comes_again() -> None:
    seen = np.concatenate([mixed_rows((FILE, WEIGHTS), 7, epoch) for epoch in range(12)])
    by_epoch = seen.reshape(12, 20)
    assert all(np.bincount(FILE[rows]).tolist() == [5, 10, 5] for rows in by_epoch)
    for number, size in enumerate((12, 5, 3)):
        stream = seen[FILE[seen] == number]
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == np.flatnonzero(number == FILE).tolist()
    assert not np.array_equal(by_epoch[0], by_epoch[1])
    assert np.array_equal(mixed_rows((FILE, [3, 6, 3]), 7, 5), by_epoch[5]), "proportions alone count"
    assert not np.array_equal(mixed_rows((FILE, WEIGHTS), 8, 5), by_epoch[5])


@pytest.mark.parametrize("weights", [[1, 1, 1], [1e-3, 5, 1e3], [0.7, 0.2, 0.1], [1e-9, 1e-9, 1]])
def test_shares_are_exact_to_a_row(weights: list[float]) -> None:
    counts = np.bincount(FILE[mixed_rows((FILE, weights), 0, 3)], minlength=3)
    assert counts.sum() == 20 and np.all(np.abs(counts - 20 * np.array(weights) / sum(weights)) <= 1)


def make(packed: bool, weights: Any = WEIGHTS, file: np.ndarray = FILE) -> Sampler:
    sampler: Sampler = PackedBatchSampler(LENGTHS, 2, 32, seed=1) if packed else BatchSampler(LENGTHS, 3, seed=1)
    sampler.mix = None if weights is None else (file, weights)
    return sampler


@pytest.mark.parametrize("packed", [False, True])
def test_a_sampler_resumes_in_an_epoch_and_with_these_weights_alone(packed: bool) -> None:
    sampler = make(packed)
    batches = sampler
    epoch = [next(batches) for _ in range(sampler.count(0))]
    flat = [row for batch in epoch for item in batch for row in (item if packed else [item])]
    assert Counter(FILE[flat].tolist()) == {0: 5, 1: 10, 2: 5}
    next(batches)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = [next(batches) for _ in range(10)]
    resumed = make(packed)
    resumed.load_state_dict(state)
    again = resumed
    assert [next(again) for _ in range(10)] == rest
    for other in (make(packed, [1, 1, 1]), make(packed, None), make(packed, file=FILE[::-1])):
        with pytest.raises(UserError, match="cannot be resumed: .* other weights"):
            other.load_state_dict(state)


# ---- tensors


def test_collate_pads_on_the_right_to_a_multiple() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": np.array([5, 6, 7], dtype=np.int32), "labels": np.array([-100, 6, 7], dtype=np.int32)},
        {"input_ids": [8, 0], "labels": [-100, 0]},
    ]
    batch = collate(rows, pad_id=9)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[5, 6, 7, *[9] * 5], [8, 0, *[9] * 6]]
    assert batch["labels"].tolist() == [[-100, 6, 7, *[-100] * 5], [-100, 0, *[-100] * 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, *[0] * 5], [1, 1, *[0] * 6]]
    assert collate([{"input_ids": [1] * 8, "labels": [1] * 8}], 9)["input_ids"].shape == (1, 8)
