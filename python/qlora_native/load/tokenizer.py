"""The tokenizer beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .source import Source, open_source


def load_tokenizer(model: str | Source) -> Any:
    """The tokenizer beside the model: in its folder, or in its GGUF file. UserError if there is no model or no
    tokenizer."""
    from transformers import AutoTokenizer

    path = Path(model).expanduser() if isinstance(model, str) else model.path
    # A GGUF file is opened only to say what is wrong with it: transformers' reader takes seconds each time.
    if isinstance(model, str) and not (path.suffix == ".gguf" and path.is_file()):
        path = open_source(path, torch.bfloat16).path
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the readers raise whatever they stumble on
        open_source(path, torch.bfloat16)  # its UserError says so if the model itself is broken
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"no usable tokenizer in {path} ({reason[:200]}); copy tokenizer.json and tokenizer_config.json "
            "of the model into it"
        ) from error
