"""From a folder or a GGUF file to a model in memory, and back to 16 bits.

``files.py`` reads safetensors, ``plan.py`` matches stored tensors with the model, ``source.py`` hands them over one
at a time, ``tree.py`` holds the model they go to, ``model.py`` is :func:`load_model`, ``merging.py`` is :func:`merge`.
"""

from __future__ import annotations

from .merging import merge
from .model import LoadReport, load_model

__all__ = ["LoadReport", "load_model", "merge"]
