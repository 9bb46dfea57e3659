"""What an adapter is: its rank, its scale, its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

ALL_LINEAR = "all-linear"


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
        layers_to_transform: numbers of the decoder layers that get an adapter, counted from 0; None is all of them.
        modules_to_save: names of dense modules that are trained whole and saved with the adapter, such as "lm_head".
        trainable_tokens: ids of tokens, also new ones, whose rows of embedding and output embedding are trained;
            or such lists by the names of modules, as in PEFT's ``trainable_token_indices``.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    rslora: bool = False
    seed: int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()
    trainable_tokens: Any = ()

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or not 1 <= rank < 1 << 31:
                raise ValueError(f"LoraConfig: the rank {name!r} is {rank!r}: expected a whole number of 1 or more.")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not _is_number(alpha):
                raise ValueError(f"LoraConfig: the alpha {name!r} is {alpha!r}: expected a finite number.")
        if sum(map(_steps, (*self.rank_pattern, *self.alpha_pattern))) > MOST_STEPS:
            raise ValueError(
                f"LoraConfig: matching rank_pattern and alpha_pattern may take over {MOST_STEPS:,} steps: expected "
                "fewer patterns, of at most three *, + or {} each."
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig: dropout is {self.dropout}: expected 0 or more and less than 1.")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            self.target_modules = [self.target_modules]
        if not self.target_modules:
            raise ValueError(f"LoraConfig: target_modules is empty: expected {ALL_LINEAR!r} or names of layers.")
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        tokens = self.trainable_tokens
        for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
            is_wrong = any(type(token) is not int or not 0 <= token < 1 << 31 for token in ids)
            if is_wrong or len({*ids}) < len(ids) or (tokens and not ids):
                raise ValueError(f"LoraConfig: trainable_tokens is {tokens!r:.200}: expected ids of tokens, each once.")

    def includes(self, path: str) -> bool:
        """Whether ``layers_to_transform`` has the first number in ``path``."""
        number = re.search(r"\.(\d+)\.", path)
        return self.layers_to_transform is None or (number is not None and int(number[1]) in self.layers_to_transform)

    def unmatched_patterns(self, paths: Sequence[str]) -> list[str]:
        """The patterns that match none of the paths."""
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        return [pattern for pattern in patterns if not any(map(_ending(pattern).match, paths))]

    def rank_of(self, path: str) -> int:
        """The rank of the layer at ``path``."""
        return _pattern_value(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """What the adapter's output at ``path`` is multiplied by."""
        rank = self.rank_of(path)
        alpha = _pattern_value(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -1e30 < value < 1e30


MOST_STEPS = 1_000_000  # of matching a path of some 64 characters, which for (a+)+b would double with each


def _steps(pattern: str) -> int:
    """An upper bound of the steps of matching a path; ValueError for a pattern that is none, or repeats groups or looks
    around, for which there is no such bound."""
    try:
        _ending(pattern)
    except (re.error, RecursionError, OverflowError, TypeError) as error:
        raise ValueError(f"LoraConfig: {pattern!r:.80} is not a pattern: {error}.") from None
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", pattern)
    if re.search(r"\)[*+{]|\(\?[^:]", bare):
        raise ValueError(f"LoraConfig: the pattern {pattern!r:.80} repeats a group or looks around: expected neither.")
    branches = (bare.count("|") + 1) ** max(1, bare.count("("))
    return 100 + 64 ** len(re.findall(r"[*+{]", bare)) * 2 ** bare.count("?") * branches


@lru_cache(maxsize=1 << 16)
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _pattern_value(patterns: dict[str, int] | dict[str, float], path: str, default):  # type: ignore[no-untyped-def]
    for pattern, value in patterns.items():
        if _ending(pattern).match(path):
            return value
    return default
