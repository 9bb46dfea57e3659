"""Greedy answers to rows of data: what a model writes after the prompt of a row, beside what stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from qlora_native.models.generate import Sampling, iter_tokens, stop_tokens
from qlora_native.tool.evaluate.measure import evaluating

LONGEST = 64  # tokens of an answer


def has_answer(row: Mapping[str, np.ndarray]) -> bool:
    """Whether a row has tokens that are not predicted, beside its first, as plain text has not."""
    return bool((row["labels"][1:] < 0).any())


def split_row(row: Mapping[str, np.ndarray]) -> tuple[list[int], np.ndarray]:
    """The tokens before the first answer of a row, and those of the answer, at most LONGEST; of a row that is trained
    as a whole its halves."""
    ids = row["input_ids"]
    is_trained = row["labels"] >= 0
    first = int(is_trained.argmax())
    first = first if first > 1 else len(ids) // 2
    length = int(np.append(is_trained[first:], False).argmin())
    return ids[:first].tolist(), ids[first : first + min(length, LONGEST)]


def as_text(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def answer(
    model: Any, tokenizer: Any, prompt: list[int], stop: set[int], *, is_sharded: bool = False
) -> str:
    """The greedy answer to a prompt, up to the first token of ``stop`` or LONGEST tokens."""
    # Processes that share a model take the same number of passes, even if one rounds to another token.
    tokens = iter_tokens(model, prompt, Sampling(max_tokens=LONGEST), set() if is_sharded else stop)
    return as_text(tokenizer, [*takewhile(lambda token: token not in stop, [*tokens])])


def answers(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """The answer to each row, with dropout off; afterwards the model is in the mode it was in."""
    stop = stop_tokens(model, tokenizer)
    with evaluating(model):
        return [answer(model, tokenizer, split_row(row)[0], stop) for row in rows]
