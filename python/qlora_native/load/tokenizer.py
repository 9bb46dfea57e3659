"""The tokenizer beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .source import GgufSource, Source, open_source


def load_tokenizer(model: str | Source) -> Any:
    """The tokenizer beside the model: in its folder, or in its GGUF file. UserError if there is no model or no
    tokenizer."""
    from transformers import AutoTokenizer

    source = open_source(Path(model).expanduser(), torch.bfloat16) if isinstance(model, str) else model
    try:
        if isinstance(source, GgufSource):
            return AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
        return AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(
            f"no usable tokenizer in {source.path} ({reason[:200]}); copy tokenizer.json and tokenizer_config.json "
            "of the model into it"
        ) from error
