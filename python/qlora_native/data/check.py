"""What trains nothing, or the wrong thing, found in the tokens of a run before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.template import IGNORE_INDEX, ChatEncoder, trained_runs

SAMPLED_ROWS = 512  # spread over the rows, which are decoded or looked at one by one
SHARE = 0.1  # of rows from which on a mistake is one of the data, not of a row
LONG_ANSWER = 32  # characters; a shorter answer may be one of those that the question offers


class Finding(NamedTuple):
    """One mistake: its ``name``, and a sentence with what was found and what to do."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def iter_findings(
    rows: TokenizedDataset,
    held_out: TokenizedDataset | None,
    tokenizer: Any,
    positions: int | None = None,
    embeddings: int | None = None,
) -> Iterator[Finding]:
    """Iterate over the mistakes in the rows of a run.

    Args:
        rows: what is trained; ``held_out``: what is evaluated.
        positions, embeddings: the longest sequence of the model and its number of tokens, where they are known.
    """
    stats = rows.stats
    encoder = ChatEncoder(tokenizer)
    count = min(SAMPLED_ROWS, len(rows))
    places = np.linspace(0, len(rows) - 1, count).astype(np.int64).tolist()
    sample = [rows[at] for at in places]
    complete = [rows[at] for at in places if not rows.truncated[at]]

    untrained = stats.dropped - stats.dropped_too_long
    if untrained > SHARE * (stats.rows + untrained):
        yield Finding(
            "masked-labels",
            f"{untrained:,} rows have no answer, and train nothing; add answers, or remove the rows",
        )
    lost = stats.truncated + stats.dropped_too_long
    if lost > SHARE * (stats.rows + stats.dropped):
        yield Finding(
            "truncated-answers",
            f"{lost:,} of {stats.rows + stats.dropped:,} rows lose their ends to data.max_length {stats.max_length:,}, "
            "so the model learns to stop in the middle; raise it, or shorten the rows",
        )
    endless = sum(not _ends(encoder, row) for row in complete)
    if endless > SHARE * len(sample):
        yield Finding(
            "no-end-token",
            f"{endless:,} of {len(complete):,} rows train no token that ends an answer, so the model never stops; give "
            "the tokenizer an eos_token, or the chat template an end of the assistant's turn",
        )
    bos = tokenizer.bos_token_id
    doubled = sum(row["input_ids"][:2].tolist() == [bos, bos] for row in sample)
    if bos is not None and doubled > SHARE * len(sample):
        yield Finding(
            "doubled-bos",
            f"{doubled:,} of {len(sample):,} rows begin with two {tokenizer.bos_token}; remove it from the data or "
            "from the chat template",
        )
    copied = sum(_repeats_answer(tokenizer, row) for row in sample)
    if copied > len(sample) / 2:
        yield Finding(
            "answer-in-prompt",
            f"in {copied:,} of {len(sample):,} rows the prompt has the answer already, so the model learns to copy; "
            "remove it from the prompt",
        )
    if stats.template == "tokenizer" and not encoder.has_generation_prompt:
        yield Finding(
            "no-assistant-turn",
            "the chat template begins no turn of the assistant (add_generation_prompt changes nothing), so a prompt "
            "differs from what was trained; use a template that does",
        )
    both = [data for data in (rows, held_out) if data is not None]
    lengths = np.concatenate([data.lengths for data in both])
    longest = int(lengths.max())
    if positions is not None and longest > positions:
        longer = int((lengths > positions).sum())
        yield Finding(
            "beyond-positions",
            f"{longer:,} of {len(lengths):,} rows have more than the model's {positions:,} positions, the longest "
            f"{longest:,} tokens; set data.max_length to {positions}, which truncates them",
        )
    highest = max(int(data.input_ids.max()) for data in both)
    if embeddings is not None and highest >= embeddings:
        yield Finding(
            "beyond-embedding",
            f"token {highest:,} ({tokenizer.convert_ids_to_tokens(highest)!r}) is beyond the {embeddings:,} of the "
            "model; copy the tokenizer of this model into its folder",
        )
    if held_out is not None:
        known = {row["input_ids"].tobytes() for row in held_out}
        seen = {key for row in rows if (key := row["input_ids"].tobytes()) in known}
        if len(seen) > SHARE * len(known):
            yield Finding(
                "trained-held-out",
                f"{len(seen):,} of {len(known):,} held-out rows are trained too, so their loss shows what was learned "
                "by heart; remove the duplicates",
            )


def _last_answer(row: dict[str, np.ndarray]) -> tuple[int, int]:
    """Where the last trained run of a row begins and ends."""
    return trained_runs(row["labels"] != IGNORE_INDEX)[-1]


def _ends(encoder: ChatEncoder, row: dict[str, np.ndarray]) -> bool:
    """Whether the last trained run of a row has a token that ends it."""
    return encoder.ends_turn(row["input_ids"][slice(*_last_answer(row))].tolist())


def _repeats_answer(tokenizer: Any, row: dict[str, np.ndarray]) -> bool:
    """Whether what is before the last trained run of a row has its text."""
    start, end = _last_answer(row)
    answer = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True).strip()
    return len(answer) >= LONG_ANSWER and answer in tokenizer.decode(row["input_ids"][:start])
