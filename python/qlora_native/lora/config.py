"""What an adapter is: its rank, its scale, its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

ALL_LINEAR = "all-linear"


class Limits:
    """Limits of a number in an annotation, which pydantic checks; without pydantic they mean nothing."""

    def __init__(self, **limits: float) -> None:
        self.limits = limits

    def __get_pydantic_core_schema__(
        self, annotation: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        return {**handler(annotation), **self.limits}


Index = Annotated[int, Limits(ge=0, lt=1 << 62)]
Rank = Annotated[int, Limits(gt=0, le=1 << 16)]
Alpha = Annotated[float, Limits(gt=-1e30, lt=1e30)]


@dataclass(frozen=True)
class LoraSettings:
    """What :class:`LoraConfig` and the section ``lora`` of a training config have in common, each field defined once:
    pydantic checks it there, by the limits given here.

    A layer is adapted if its path is one of ``target_modules``, or ends with a dot and one of them. The patterns are
    regular expressions for the end of a path, as in PEFT.
    """

    r: Rank = field(
        default=16, metadata={"description": "rank; parameters and memory of the adapter grow with it"}
    )
    alpha: float = field(
        default=32.0,
        metadata={
            "description": "the adapter's product is scaled by alpha / r (alpha / sqrt(r) with rslora)",
            "gt": 0,
            "lt": 1e30,
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={
            "description": "share of the adapter's inputs dropped in training; helps on small data",
            "ge": 0,
            "lt": 1,
        },
    )
    target_modules: str | list[str] = field(
        default=ALL_LINEAR,
        metadata={"description": "names of the layers that get an adapter, or all-linear"},
    )
    layers_to_transform: list[Index] | None = field(
        default=None,
        metadata={
            "description": "numbers of the decoder layers that get an adapter, counted from 0; null = all"
        },
    )
    rank_pattern: dict[str, Rank] = field(
        default_factory=dict,
        metadata={
            "description": "other ranks, by the end of a layer's path or a regular expression for it: {down_proj: 32}"
        },
    )
    alpha_pattern: dict[str, Alpha] = field(
        default_factory=dict, metadata={"description": "other values of alpha, likewise"}
    )
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata={
            "description": "modules that are trained whole, as fp32 copies, and saved with the adapter: "
            "[embed_tokens, lm_head]"
        },
    )
    rslora: bool = field(
        default=False, metadata={"description": "scale by alpha / sqrt(r): steadier for large r"}
    )


@dataclass(frozen=True)
class LoraConfig(LoraSettings):
    """A LoRA adapter, for :func:`qlora_native.add_lora`. It has the keys of section ``lora`` of docs/config.md, but for
    ``adapter``, ``lora_plus_ratio`` and ``ship``, and with ids as ``trainable_tokens``.

    Attributes:
        seed: the same seed gives the same adapter; None draws from torch's global generator.
        trainable_tokens: ids of tokens, also new ones, whose rows of embedding and output embedding are trained;
            or such lists by the names of modules, as in PEFT's ``trainable_token_indices``.
    """

    seed: int | None = None
    trainable_tokens: Any = ()

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or not 1 <= rank < 1 << 31:
                raise ValueError(
                    f"LoraConfig: the rank {name!r} is {rank!r}: expected a whole number of 1 or more."
                )
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not _is_number(alpha):
                raise ValueError(
                    f"LoraConfig: the alpha {name!r} is {alpha!r}: expected a finite number."
                )
        if sum(map(_steps, (*self.rank_pattern, *self.alpha_pattern))) > MOST_STEPS:
            raise ValueError(
                f"LoraConfig: matching rank_pattern and alpha_pattern may take over {MOST_STEPS:,} steps: expected "
                "fewer patterns, of at most three *, + or {} each."
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoraConfig: dropout is {self.dropout}: expected 0 or more and less than 1."
            )
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            object.__setattr__(self, "target_modules", [self.target_modules])
        if not self.target_modules:
            raise ValueError(
                f"LoraConfig: target_modules is empty: expected {ALL_LINEAR!r} or names of layers."
            )
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", [self.modules_to_save])
        tokens = self.trainable_tokens
        for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
            is_wrong = any(type(token) is not int or not 0 <= token < 1 << 31 for token in ids)
            if is_wrong or len({*ids}) < len(ids) or (tokens and not ids):
                raise ValueError(
                    f"LoraConfig: trainable_tokens is {tokens!r:.200}: expected ids of tokens, each once."
                )

    def includes(self, path: str) -> bool:
        """Whether ``layers_to_transform`` has the first number in ``path``."""
        number = re.search(r"\.(\d+)\.", path)
        return self.layers_to_transform is None or (
            number is not None and int(number[1]) in self.layers_to_transform
        )

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


# Steps of matching a path of some 64 characters, which for (a+)+b would double with each.
MOST_STEPS = 1_000_000


def _steps(pattern: str) -> int:
    """An upper bound of the steps of matching a path; ValueError for a pattern that is none, or repeats groups or looks
    around, for which there is no such bound."""
    try:
        _ending(pattern)
    except (re.error, RecursionError, OverflowError, TypeError) as error:
        raise ValueError(f"LoraConfig: {pattern!r:.80} is not a pattern: {error}.") from None
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", pattern)
    if re.search(r"\)[*+{]|\(\?[^:]", bare):
        raise ValueError(
            f"LoraConfig: the pattern {pattern!r:.80} repeats a group or looks around: expected neither."
        )
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
