"""Layers with quantized weights."""

from __future__ import annotations

from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear

__all__ = ["QuantizedEmbedding", "QuantizedLinear"]
