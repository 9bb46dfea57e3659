"""How the package meets the models and libraries of the ecosystem."""

from __future__ import annotations

from .fused import fuse, unfuse

__all__ = ["fuse", "unfuse"]
