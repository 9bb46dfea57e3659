"""From a folder or a GGUF file to a model in memory, and back to 16 bits.

``files.py`` reads safetensors, ``plan.py`` matches stored tensors with the model, ``source.py`` hands them over one
at a time, ``tree.py`` holds the model they go to, ``model.py`` is :func:`load_model`, ``merging.py`` is :func:`merge`,
``residuals.py`` reads the 16-bit weights again for adapters that begin with what 4 bits lost.
"""

from __future__ import annotations

from .merging import merge
from .model import LoadReport, load_model
from .residuals import lora_statistics

__all__ = ["LoadReport", "load_model", "lora_statistics", "merge"]
