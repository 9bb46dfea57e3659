"""Layers with quantized weights."""

from __future__ import annotations

from qlora_native.nn.embedding import QuantizedEmbedding
from qlora_native.nn.linear import QuantizedLinear

__all__ = ["QuantizedEmbedding", "QuantizedLinear"]
