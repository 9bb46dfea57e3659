"""The models that an evaluation compares, loaded one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_native.load import load_model
from qlora_native.load.layers import OUTPUT_EMBEDDING
from qlora_native.load.source import open_source
from qlora_native.load.tree import Tree


def is_four_bit(path: Path) -> bool:
    """Whether the files of a model hold 4-bit weights. UserError if there is no model."""
    source = open_source(path, torch.bfloat16)
    return source.is_four_bit(Tree(source.config, torch.bfloat16, torch.device("cpu")))


def load_dense(path: Path, dtype: torch.dtype, device: Any = None) -> Any:
    """The model with nothing quantised, through the same reader and the same native modules as the 4-bit one."""
    source = open_source(path, dtype)
    children = [name for name, _ in Tree(source.config, dtype, torch.device("cpu")).model.named_children()]
    return load_model(path, dtype=dtype, device=device, skip_modules=(*children, OUTPUT_EMBEDDING))
