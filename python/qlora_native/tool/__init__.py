"""What the command ``qlora`` needs and a program of one's own does not: the config, the training run, reports."""

from __future__ import annotations


def card_dtype() -> str:
    """Name of the 16-bit type to compute in: bfloat16, or float16 on a card that only emulates it, about ten times
    slower."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16"
