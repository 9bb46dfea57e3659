"""The rows of a run: which files its config names, tokenized and masked, and which rows are held out."""

from __future__ import annotations

from typing import Any

from qlora_native._io import as_user_error, user_path
from qlora_native.data.dataset import TokenizedDataset, load_dataset
from qlora_native.errors import UserError
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.sections import DataConfig


def load_rows(config: TrainConfig, tokenizer: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """:func:`load_split` for a training run, whose folder takes the tokens that do not fit into memory."""
    for key in ("patience", "samples") if config.data.eval is None and config.data.eval_fraction == 0 else ():
        if isinstance(value := getattr(config.train, key), int) and value:
            raise UserError(
                f"train.{key} is {value}, and no rows are held out: set data.eval, or data.eval_fraction above 0"
            )
    return load_split(config, tokenizer, folder=user_path(config.output_dir))


def load_split(config: TrainConfig, tokenizer: Any, **options: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training rows and held-out rows, None if there are to be none; ``options`` as of :func:`load_files`."""
    data = config.data
    rows = load_files(data, data.train, tokenizer, **options)
    if data.eval is not None:
        return rows, load_files(data, data.eval, tokenizer, **options)
    if data.eval_fraction == 0:
        return rows, None
    held_out = max(1, round(data.eval_fraction * len(rows)))  # a few rows still give a held-out loss
    return rows.split(held_out, config.train.seed)


def load_files(data: DataConfig, path: str | list[str], tokenizer: Any, **options: Any) -> TokenizedDataset:
    """The rows of files; ``folder`` and ``limit`` as in :func:`~qlora_native.data.dataset.load_dataset`."""
    options |= {"max_length": data.max_length, "train_on": data.train_on, "columns": data.columns}
    with as_user_error():
        return load_dataset(path, tokenizer, format=None if data.format == "auto" else data.format, **options)


def longest(data: DataConfig, rows: TokenizedDataset) -> int:
    """Tokens of the longest sequence of a run on ``rows``."""
    return data.max_length if data.packing else int(rows.lengths.max())
