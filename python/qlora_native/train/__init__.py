"""Training: the checked config, the loop on one page, checkpoints that survive a kill, and the memory-lean loss.

``config.py`` needs pydantic and pyyaml alone; the loop, which needs transformers, is imported when ``Trainer`` is
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_native.train.config import TrainConfig

if TYPE_CHECKING:
    from qlora_native.train.loop import Trainer as Trainer
    from qlora_native.train.loop import TrainSummary as TrainSummary

__all__ = ["TrainConfig", "TrainSummary", "Trainer"]


def __getattr__(name: str) -> Any:
    if name in ("Trainer", "TrainSummary"):
        from qlora_native.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
