"""Multiple-choice questions, answered by the likelihood that a model gives to each choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qlora_native.data import IGNORE_INDEX, read_rows
from qlora_native.errors import UserError
from qlora_native.evaluate.measure import Rows

KEYS = ("question", "choices", "answer")
PROMPT = "Question: {question}\nAnswer:"  # and then a space and a choice


@dataclass(frozen=True)
class Choices:
    """A file of questions, tokenized: one row for each choice, of which only the choice's tokens are predicted.

    Attributes:
        name: the file's name.
        rows: token ids and labels, those of a question together.
        starts: where each question's rows begin, with the end of the last; [questions + 1].
        answers: which choice is right; [questions].
        num_bytes: UTF-8 bytes of each choice; [rows].
    """

    name: str
    rows: Rows
    starts: list[int]
    answers: list[int]
    num_bytes: list[int]

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions answered right, each with its standard error.

    ``plain`` takes the choice of the largest log-likelihood; ``normalized`` the one of the largest log-likelihood for
    each byte of it, which does not favor short choices.
    """

    questions: int
    plain: tuple[float, float]
    normalized: tuple[float, float]


def load_choices(path: str | Path, tokenizer: Any, *, max_length: int = 1024, limit: int | None = None) -> Choices:
    """Read a JSONL, JSON or Parquet file of rows with ``question``, ``choices`` and ``answer``.

    ``answer`` is the number of the right choice counted from 0, its letter (A for the first), or its text. A row that
    is longer than ``max_length`` loses the start of its question.

    Raises:
        UserError: the file or a row is wrong; named by file and line.
    """
    rows: list[dict[str, np.ndarray]] = []
    starts, answers, num_bytes = [0], [], []
    for source in read_rows(path, limit=limit):
        question, choices, answer = _checked(source.where, source.data)
        prompt = PROMPT.format(question=question.strip())
        before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for choice in choices:
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False, verbose=False)["input_ids"]
            start = min(before, len(ids) - 1)  # a tokenizer may join the prompt's end with the choice
            ids, start = ids[-max_length:], max(1, start - max(0, len(ids) - max_length))
            labels = np.asarray(ids, dtype=np.int32)
            labels[:start] = IGNORE_INDEX
            rows.append({"input_ids": np.asarray(ids, dtype=np.int32), "labels": labels})
            num_bytes.append(len(choice.encode()))
        starts.append(len(rows))
        answers.append(answer)
    return Choices(Path(path).name, rows, starts, answers, num_bytes)


def accuracy(choices: Choices, nats: Tensor) -> Accuracy:
    """The accuracy of a model that gives each row's predicted tokens ``nats`` of cross-entropy, [rows]."""
    likelihood = -nats.numpy()
    by_byte = likelihood / np.asarray(choices.num_bytes)
    return Accuracy(len(choices), _share_right(choices, likelihood), _share_right(choices, by_byte))


def _share_right(choices: Choices, scores: np.ndarray) -> tuple[float, float]:
    parts = zip(choices.starts, choices.starts[1:], choices.answers, strict=False)
    right = [int(np.argmax(scores[start:end])) == answer for start, end, answer in parts]
    share, count = sum(right) / len(right), len(right)
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def _checked(where: str, data: dict[str, Any]) -> tuple[str, list[str], int]:
    absent = [key for key in KEYS if key not in data]
    if absent:
        raise UserError(
            f"{where}: the row has no {' and no '.join(map(repr, absent))}, only {sorted(data)}; expected "
            '{"question": "...", "choices": ["...", "..."], "answer": 0}.'
        )
    question, choices, answer = (data[key] for key in KEYS)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: 'question' is {question!r}, expected text.")
    sound = isinstance(choices, list | tuple | np.ndarray) and all(isinstance(one, str) and one for one in choices)
    if not sound or len(choices) < 2:
        raise UserError(f"{where}: 'choices' is {choices!r}, expected a list of at least two texts.")
    texts = [str(one) for one in choices]
    if isinstance(answer, str) and answer in texts:
        return question, texts, texts.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int | np.integer) or not 0 <= answer < len(texts):
        raise UserError(
            f"{where}: 'answer' is {data['answer']!r}, expected a number from 0 to {len(texts) - 1}, a letter from A "
            f"to {chr(ord('A') + len(texts) - 1)}, or one of the choices."
        )
    return question, texts, int(answer)
