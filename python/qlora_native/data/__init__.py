"""From a data file to batches of tensors: read rows, name their format, apply the chat template, mask, batch.

::

    dataset = load_dataset("train.jsonl", tokenizer, max_length=1024)
    print(dataset.stats.describe())
    plan = BatchPlan(dataset.lengths, batch_size=4, seed=0)
    for rows in plan:
        batch = collate([dataset[i] for i in rows], pad_id=padding_id(tokenizer))
"""

from __future__ import annotations

from qlora_native.data.batching import BatchPlan, collate
from qlora_native.data.dataset import DatasetStats, TokenizedDataset, load_dataset
from qlora_native.data.formats import FORMATS, Message, Row, infer_format, normalize
from qlora_native.data.packing import PackedPlan, collate_packed
from qlora_native.data.readers import DATA_SUFFIXES, SourceRow, read_rows
from qlora_native.data.template import DEFAULT_CHAT_TEMPLATE, IGNORE_INDEX, ChatEncoder, Encoded, padding_id

__all__ = [
    "DATA_SUFFIXES",
    "DEFAULT_CHAT_TEMPLATE",
    "FORMATS",
    "IGNORE_INDEX",
    "BatchPlan",
    "ChatEncoder",
    "DatasetStats",
    "Encoded",
    "Message",
    "PackedPlan",
    "Row",
    "SourceRow",
    "TokenizedDataset",
    "collate",
    "collate_packed",
    "infer_format",
    "load_dataset",
    "normalize",
    "padding_id",
    "read_rows",
]
