"""What qn.tune finds on this card: the plans it would replace, and by how much."""

from __future__ import annotations

from typing import Any

import torch
from common import rounded

import qlora_native as qn
from qlora_native.tuning import Tuned


def _product(found: Tuned) -> dict[str, Any]:
    return {
        "forward": found.problem.forward,
        "low_memory": found.problem.low_memory,
        "candidates": found.candidates,
        "built_in": str(found.built_in),
        "chosen": str(found.chosen),
        "built_in_ms": rounded([found.built_in_seconds], 1e3)[0],
        "chosen_ms": rounded([found.chosen_seconds], 1e3)[0],
        "left_out": list(found.left_out),
    }


def row(n: int, k: int, m: int, device: torch.device) -> dict[str, Any]:
    """Both directions of m tokens with a weight [n, k]; a match if no candidate failed or gave another result."""
    found = qn.tune([(n, k)], tokens=[m], device=device)
    return {"match": not any(each.left_out for each in found), "products": [_product(each) for each in found]}
