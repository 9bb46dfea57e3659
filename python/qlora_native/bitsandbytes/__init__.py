"""The 4-bit half of bitsandbytes' interface over this library's kernels.

``import qlora_native.bitsandbytes as bnb`` in place of ``import bitsandbytes as bnb``. docs/bitsandbytes.md lists what
it offers, and where it differs from bitsandbytes and why.
"""

from __future__ import annotations

from typing import Any

from qlora_native.bitsandbytes import functional, nn, optim
from qlora_native.bitsandbytes.functional import matmul_4bit
from qlora_native.bitsandbytes.nn import modules
from qlora_native.bitsandbytes.ops import register_ops

__all__ = ["functional", "matmul_4bit", "modules", "nn", "optim", "register_ops"]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"qlora_native.bitsandbytes has no {name!r}: it offers {', '.join(__all__)}.")
