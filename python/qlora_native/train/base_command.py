"""The command that makes the 4-bit weights of a training run once more, as files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_native.calibration.data import FILE


def quantize_command(model: str, quant: Mapping[str, Any], dtype: str, calibration: Path | str | None, out: str) -> str:
    """The line for a shell.

    Args:
        model: the 16-bit model of the run.
        quant: the section ``quant`` of its config; what is left out has its default.
        dtype: ``train.dtype``.
        calibration: the text, or the sequences that the run kept. out: the new folder.
    """
    words = ["qlora", "quantize", model, "--method", quant.get("method", "rtn")]
    if calibration is not None:
        words += ["--calibration", str(calibration)]
    if (kind := quant.get("type", "nf4")) != "nf4":
        words += ["--quant-type", kind]
    if (size := quant.get("block_size", 64)) != 64:
        words += ["--block-size", str(size)]
    if not quant.get("double_quant", True):
        words.append("--no-double-quant")
    if dtype != "bfloat16":
        words += ["--dtype", dtype]
    return shlex.join([*words, "--out", out])


def kept_calibration(adapter: Path) -> Path | None:
    """What the run of an adapter was calibrated on, if its folder still lies in that of the run."""
    return next((path for parent in adapter.resolve().parents[:2] if (path := parent / FILE).is_file()), None)
