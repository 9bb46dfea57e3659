"""Packing: full sequences, the same every time, and rows without attention to their neighbors."""

from __future__ import annotations

import copy
import json
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn

from qlora_native.data import batching
from qlora_native.data.batching import BatchSampler, PackedBatchSampler, collate_packed, pack
from qlora_native.errors import UserError
from qlora_native.models.fuse import documents_of, fuse
from qlora_native.models.loss import causal_lm_loss, trained_tokens
from qlora_native.tool.train.setup import check_packing


def lengths(rows: int, low: int = 10, high: int = 100) -> np.ndarray:
    draw = random.Random(0)
    return np.array([draw.randint(low, high) for _ in range(rows)])


# ---- sequences


def test_a_known_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.array([4, 7, 3, 6, 2, 8])
    # Longest first: 8 | 7 | 6 | 4 to the 6 | 3 to the 7 | 2 to the 8, all of them full.
    assert pack(sizes, np.arange(6), 10) == [[5, 4], [1, 2], [3, 0]]
    monkeypatch.setattr(batching, "WINDOW_ROWS", 3)
    assert pack(sizes, np.arange(6), 10) == [[1, 2], [0], [5, 4], [3]]


def test_every_row_once_per_epoch_and_hardly_any_room_is_left() -> None:
    sizes = lengths(5000)
    sampler = PackedBatchSampler(sizes, 8, 256, seed=3)
    epochs = [[rows for batch in sampler.batches(epoch) for rows in batch] for epoch in range(2)]
    for sequences in epochs:
        assert sorted(row for rows in sequences for row in rows) == list(range(5000))
        filled = [int(sizes[rows].sum()) for rows in sequences]
        assert max(filled) <= 256
        assert sum(filled) > 0.98 * 256 * len(sequences)
    assert {frozenset(rows) for rows in epochs[0]} != {frozenset(rows) for rows in epochs[1]}, "rows mix anew"
    assert PackedBatchSampler(sizes, 8, 256, seed=3).batches(1) == sampler.batches(1)
    assert PackedBatchSampler(sizes, 8, 256, seed=4).batches(1) != sampler.batches(1)
    assert sampler.steps(1.5) == sampler.count(0) + -(-sampler.count(1) // 2)


def test_a_run_resumes_in_the_middle_of_an_epoch(sentence: Any) -> None:
    def sampler(packed_length: int = 150) -> PackedBatchSampler:
        return PackedBatchSampler(lengths(90), 3, packed_length, seed=7)

    whole = list(islice(sampler(), 30))
    first = sampler()
    seen = list(islice(first, 17))
    resumed = sampler()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.epoch >= 1 and resumed.batch > 0
    assert seen + list(islice(resumed, 13)) == whole
    for other in (BatchSampler(lengths(90), 3, seed=7), sampler(200)):
        with pytest.raises(UserError) as raised:
            other.load_state_dict(first.state_dict())
        sentence(raised.value)


# ---- tensors


def rows_of(*sizes: int) -> list[dict[str, Any]]:
    """Random rows; of each, some tokens are trained."""
    draw = np.random.RandomState(0)
    rows = []
    for size in sizes:
        ids = draw.randint(3, tiny_models.VOCAB, size)
        rows.append({"input_ids": ids, "labels": np.where(draw.rand(size) < 0.7, ids, -100)})
    return rows


def test_collate_packed_lays_rows_end_to_end() -> None:
    first, second, third = (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
        {"input_ids": [1], "labels": [-100]},
    )
    batch = collate_packed([[first, second], [third]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100], [-100] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]


# ---- models


def alone(model: nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The loss over all rows, each on its own in transformers' code, from full logits."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[None, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total = total + F.cross_entropy(logits[0].float(), labels[0], ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.filterwarnings("ignore:.*the model's own logits")
@pytest.mark.parametrize(
    ("kind", "changes", "dtype"),
    [
        ("Llama", {}, torch.float32),
        ("Llama", {"hidden_size": 128}, torch.bfloat16),  # native attention
        ("Qwen2", {}, torch.float32),
        ("Mistral", {"sliding_window": 7}, torch.float32),  # shorter than the rows
        ("Gemma2", {"sliding_window": 7, "head_dim": 16, "query_pre_attn_scalar": 16}, torch.float32),
        ("Gemma3Text", {"sliding_window": 7, "head_dim": 16}, torch.float32),
        ("Phi3", {}, torch.float32),
        ("GPT2", {}, torch.float32),  # learned positions
    ],
)
def test_losses_and_gradients_are_those_of_the_rows_alone(
    kind: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    exact = dtype == torch.float32
    rows, at = (rows_of(13, 9, 20, 1, 5, 16), 4) if exact else (rows_of(130, 40, 70, 33), 2)
    model = tiny_models.make(kind, dtype, **changes)
    truth = copy.deepcopy(model).float()
    fuse(model)
    check_packing(model)
    batch = collate_packed([rows[:at], rows[at:]], pad_id=0)
    assert trained_tokens(batch) == sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    loss, expected = causal_lm_loss(model, batch), alone(truth, rows)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if exact else 5e-3)
    for (name, got), wanted in zip(model.named_parameters(), truth.parameters(), strict=True):
        if wanted.grad is not None:
            assert got.grad is not None, name
            difference = float((got.grad - wanted.grad).norm())
            assert difference <= (1e-5 if exact else 5e-2) * float(wanted.grad.norm()) + 1e-7, name


def test_without_positions_that_start_again_the_comparison_fails() -> None:
    model = tiny_models.make()
    rows = rows_of(13, 9, 20)
    batch = collate_packed([rows], pad_id=0)
    expected = alone(model, rows).item()
    assert causal_lm_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    assert abs(causal_lm_loss(model, batch).item() - expected) > 1e-4 * expected


def test_a_model_that_carries_something_from_row_to_row_is_refused() -> None:
    class Leaking(nn.Module):
        """Adds a running mean of all earlier tokens."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    model = tiny_models.make()
    model.model.layers[0].mlp = Leaking(model.model.layers[0].mlp)
    with pytest.raises(UserError, match=r"LlamaForCausalLM .* packed rows: .* change by \d+%"):
        check_packing(model)


def test_documents_are_read_from_the_mask() -> None:
    tril = torch.ones(9, 9, dtype=torch.bool).tril()
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    mask = (tril & (group[:, None] == group))[None, None]
    found = documents_of(mask, 2)
    assert found is not None and len(found) == 2
    assert [(document.length, document.mask) for document in found[0]] == [(4, None), (2, None), (3, None)]
    windowed = mask & torch.ones(9, 9, dtype=torch.bool).triu(-1)  # a window of two
    (sequence,) = documents_of(windowed, 1) or ()
    assert [document.mask is None for document in sequence] == [False, True, False]
    first = sequence[0].mask
    assert first is not None and torch.equal(first[0, 0], windowed[0, 0, :4, :4])
    leaking = mask.clone()
    leaking[..., 8, 0] = True
    unseeing = mask.clone()
    unseeing[..., 5, 5] = False
    for other in (tril[None, None], leaking, unseeing, mask.float(), mask[0, 0]):
        assert documents_of(other, 1) is None
