"""transformers' Trainer reads back the adapters of :func:`qlora_native.add_lora` that it saved in its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import trainer

from qlora_native.lora.adapter import TENSORS_NAME
from qlora_native.lora.layer import lora_layers
from qlora_native.lora.model import load_adapter


def _reading_ours(load: Callable[..., Any], folder_of: Callable[..., str]) -> Callable[..., Any]:
    @wraps(load)
    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(folder_of(self, *args, **kwargs))
        if (folder / TENSORS_NAME).is_file() and any(lora_layers(self.model)):
            with warnings.catch_warnings():
                # The warning would say that it takes the place of what was trained since.
                warnings.simplefilter("ignore", UserWarning)
                return load_adapter(self.model, folder)
        return load(self, *args, **kwargs)

    return read


Trainer = trainer.Trainer
Trainer._load_from_checkpoint = _reading_ours(
    Trainer._load_from_checkpoint,
    lambda self, resume_from_checkpoint, model=None: resume_from_checkpoint,
)
Trainer._load_best_model = _reading_ours(
    Trainer._load_best_model, lambda self: self.state.best_model_checkpoint
)
