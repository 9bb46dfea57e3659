"""Layers with 4-bit weights."""

from __future__ import annotations

from qlora_native.nn.linear import QuantizedLinear

__all__ = ["QuantizedLinear"]
