"""What an adapter is: its rank, its scale, its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"
# How an adapter begins: changing nothing, or with what 4 bits lost of each weight.
ZERO, H_SVD, LOFTQ = "zero", "h_svd", "loftq"
INITS = (ZERO, H_SVD, LOFTQ)


@dataclass
class LoraConfig:
    """A LoRA adapter, for :func:`qlora_native.add_lora`.

    Attributes:
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: share of x's elements zeroed before the adapter sees it, in training only; 0 <= dropout < 1.
        target_modules: "all-linear" (every linear layer but the output embedding), or names: a layer is adapted if its
            path is one of them or ends with a dot and one of them.
        rslora: scale by alpha / sqrt(r) instead (Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023).
        seed: the same seed gives the same adapter; None draws from torch's global generator.
        rank_pattern: rank of the layers whose path ends in (or equals) the key, a regular expression as in PEFT.
        alpha_pattern: alpha, likewise.
        modules_to_save: names of dense modules that are trained whole and saved with the adapter, such as "lm_head".
        init: "zero" begins with an adapter that changes nothing. "h_svd" begins with the best rank-r correction of what
            4 bits lost, weighted by the inputs' second moments, "loftq" with the unweighted one (Li et al., "LoftQ",
            2023, with one iteration); both need statistics, see :func:`qlora_native.add_lora`. An adapter that begins
            so belongs to that one 4-bit base, and needs a lower learning rate (docs/quality.md).
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    rslora: bool = False
    seed: int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    init: str = ZERO

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"LoraConfig: the rank {name!r} is {rank!r}: expected a whole number of 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig: dropout is {self.dropout}: expected 0 or more and less than 1.")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            self.target_modules = [self.target_modules]
        if not self.target_modules:
            raise ValueError(f"LoraConfig: target_modules is empty: expected {ALL_LINEAR!r} or names of layers.")
        if self.init not in INITS:
            raise ValueError(f"LoraConfig: init is {self.init!r}: expected {', '.join(map(repr, INITS))}.")
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]

    def rank_of(self, path: str) -> int:
        """The rank of the layer at ``path``."""
        return _pattern_value(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """What the adapter's output at ``path`` is multiplied by."""
        rank = self.rank_of(path)
        alpha = _pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _pattern_value(patterns: dict[str, int] | dict[str, float], path: str, default):  # type: ignore[no-untyped-def]
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
