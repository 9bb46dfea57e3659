"""The optimizers of ``bitsandbytes.optim`` that QLoRA is trained with."""

from __future__ import annotations

from typing import Any

from qlora_native.bitsandbytes.optim.manager import GlobalOptimManager
from qlora_native.bitsandbytes.optim.optimizers import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    Lion,
    Lion8bit,
    Lion32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
    PagedLion,
    PagedLion8bit,
    PagedLion32bit,
)
from qlora_native.bitsandbytes.optim.states import native_state_dict

__all__ = [
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "native_state_dict",
]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"qlora_native.bitsandbytes.optim has no {name!r}: it offers {', '.join(__all__)}.")
