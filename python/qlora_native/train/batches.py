"""From rows to micro-batches: the order in which a run meets its rows, padded or packed as the config says.

An item of a batch is the number of a row, or the list of those that are packed into one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_native.config import TrainConfig
from qlora_native.data.batching import BatchSampler, PackedBatchSampler, Sampler, collate, collate_packed
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.distributed.ranks import Items
from qlora_native.errors import UserError
from qlora_native.hf.loss import hidden_states

Batch = dict[str, Tensor]

# How far the hidden states of one token may lie apart in two orders of rounding, relative to their norm.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def make_sampler(config: TrainConfig, rows: TokenizedDataset) -> Sampler[Any]:
    """The order of the steps: each has ``batch_size * grad_accum`` rows of like length, or as many packed sequences."""
    options = config.train
    size = options.batch_size * options.grad_accum
    if config.data.packing:
        return PackedBatchSampler(rows.lengths, size, config.data.max_length, seed=options.seed)
    return BatchSampler(rows.lengths, size, seed=options.seed)


def token_count(rows: TokenizedDataset, items: Items) -> int:
    """Tokens of a batch, padding not counted."""
    return int(sum(rows.lengths[item].sum() for item in items))


def micro_batches(
    rows: TokenizedDataset, items: Items, batch_size: int, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """The items of one step, ``batch_size`` at a time, as tensors on ``device``."""
    for at in range(0, len(items), batch_size):
        part = items[at : at + batch_size]
        sequences = [[rows[number] for number in item] for item in part if isinstance(item, list)]
        if sequences:
            batch = collate_packed(sequences, pad_id)
        else:
            batch = collate([rows[number] for number in part if isinstance(number, int)], pad_id)
        yield {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def check_packing(model: Any) -> None:
    """UserError if a row comes out otherwise when another one stands before it in its sequence.

    Two short rows are enough: what a model carries across rows, and positions that it does not count anew, show at
    once. Draws no random number.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    numbers = torch.arange(28, device=model.device)[None]
    first, other = ((numbers[:, :12] * step + 3) % vocabulary for step in (5, 11))
    row = (numbers * 7 + 1) % vocabulary
    positions = torch.cat((numbers[:, :12], numbers), 1)
    name = type(model).__name__
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        alone = _hidden(model, {"input_ids": row, "position_ids": numbers})
        behind, behind_other = (
            _hidden(model, {"input_ids": torch.cat((head, row), 1), "position_ids": positions})[:, 12:]
            for head in (first, other)
        )
    except TypeError as error:
        raise UserError(f"{name} cannot train on packed rows: {error}; set data.packing to false") from error
    finally:
        for module, training in before.items():
            module.training = training
    for got, expected in ((behind, alone), (behind_other, behind)):
        distance = float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        if not distance <= TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
            raise UserError(
                f"{name} cannot train on packed rows: a row's hidden states change by {distance:.0%} when another row "
                "stands before it; set data.packing to false"
            )


def _hidden(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return hidden_states(model, inputs)[0].float()
