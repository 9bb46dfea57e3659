"""The order of a run's rows: the sampler, and micro-batches of tensors.

An item of a batch is the number of a row, or the list of those that are packed into one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_native.data.batching import BatchSampler, PackedBatchSampler, Sampler, collate, collate_packed
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.distributed import Items
from qlora_native.errors import UserError
from qlora_native.models.fuse import modes_kept
from qlora_native.models.loss import hidden_states
from qlora_native.tool.config import TrainConfig

Batch = dict[str, Tensor]


def make_sampler(config: TrainConfig, rows: TokenizedDataset) -> Sampler:
    """The order of the steps: each has ``batch_size * grad_accum`` rows of like length, or as many packed sequences."""
    size = config.train.batch_size * config.train.grad_accum
    seed = config.train.seed
    sampler: Sampler = BatchSampler(rows.lengths, size, seed=seed)
    if config.data.packing:
        sampler = PackedBatchSampler(rows.lengths, size, config.data.max_length, seed=seed)
    if config.data.weights is not None:
        for number, path in enumerate(config.data.files):
            if number not in rows.file:
                raise UserError(f"{path} has no row left to train on: remove it, or add rows")
        sampler.mix = (rows.file, config.data.weights)
    return sampler


def micro_batches(
    rows: TokenizedDataset, items: Items, batch_size: int, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """The items of one step, ``batch_size`` at a time, as tensors on ``device``."""
    for at in range(0, len(items), batch_size):
        part: Any = items[at : at + batch_size]
        if isinstance(part[0], list):
            batch = collate_packed([[rows[number] for number in item] for item in part], pad_id)
        else:
            batch = collate([rows[number] for number in part], pad_id)
        yield {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def check_packing(model: Any) -> None:
    """UserError if a row's hidden states change when another row stands before it in its sequence, as they do where a
    state is carried across rows or positions do not restart. Draws no random number."""

    def hidden(ids: Tensor, positions: Tensor) -> Tensor:
        return hidden_states(model, {"input_ids": ids, "position_ids": positions})[0]

    vocabulary = model.get_input_embeddings().num_embeddings
    numbers = torch.arange(28, device=model.device)[None]
    row = (numbers * 7 + 1) % vocabulary
    positions = torch.cat((numbers[:, :12], numbers), 1)
    heads = ((numbers[:, :12] * step + 3) % vocabulary for step in (5, 11))
    name = type(model).__name__
    with modes_kept(model):
        model.eval()
        try:
            alone = hidden(row, numbers)
            found = [hidden(torch.cat((head, row), 1), positions)[:, 12:] for head in heads]
        except TypeError as error:
            raise UserError(f"{name} cannot train on packed rows: {error}; set data.packing to false") from error
    for behind in found:
        off = (behind.float() - alone.float()).norm(dim=-1)
        distance = float((off / alone.float().norm(dim=-1)).max())
        if not distance <= (1e-3 if behind.dtype == torch.float32 else 5e-2):  # of two orders of rounding
            raise UserError(
                f"{name} cannot train on packed rows: a row's hidden states change by {distance:.0%} when another row "
                "stands before it; set data.packing to false"
            )
