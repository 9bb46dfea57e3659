"""The layers of ``bitsandbytes.nn`` that are 4-bit."""

from __future__ import annotations

from typing import Any

from qlora_native.bitsandbytes.nn.modules import Linear4bit, LinearFP4, LinearNF4, Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"qlora_native.bitsandbytes.nn has no {name!r}: it offers {', '.join(__all__)}."
    )
