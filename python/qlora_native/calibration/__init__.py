"""Quantization that looks at the inputs of a weight: the same format and bytes, a smaller loss."""

from __future__ import annotations

from qlora_native.calibration.quantize import METHODS, CalibratedWeight, CalibrationReport, quantize_calibrated

__all__ = ["METHODS", "CalibratedWeight", "CalibrationReport", "quantize_calibrated"]
