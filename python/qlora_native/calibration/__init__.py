"""Quantization by statistics of a weight's inputs: the same format and bytes, a smaller loss."""

from __future__ import annotations

from qlora_native.calibration.quantize import quantize_calibrated as quantize_calibrated
