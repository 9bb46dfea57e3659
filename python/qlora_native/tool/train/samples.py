"""Answers at each evaluation, to prompts or to the first held-out rows: short, of the likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.template import ChatEncoder, check_vocabulary
from qlora_native.models.fuse import modes_kept
from qlora_native.models.generate import stop_tokens
from qlora_native.tool.evaluate.answers import answer, as_text, split_row
from qlora_native.tool.train.checkpoint import TrainState
from qlora_native.tool.train.progress import Observer, Record

# Prompt, expected (of a held-out row), before (the first answer of the run), answer.
Sample = dict[str, str]


class Samples(Observer):
    """``asked`` is ``train.samples``. A prompt is a user's message, or plain text if the training rows are."""

    def __init__(
        self,
        asked: int | list[str],
        model: Any,
        tokenizer: Any,
        rows: TokenizedDataset,
        held_out: Any,
        is_sharded: bool,
    ) -> None:
        self._model, self._tokenizer, self._is_sharded = model, tokenizer, is_sharded
        self._answers: list[Sample] = []
        self._stop = stop_tokens(model, tokenizer)
        self._prompts = list[tuple[list[int], Sample]]()
        if isinstance(asked, int):
            for row in islice(held_out, asked):
                prompt, expected = split_row(row)
                texts = {
                    "prompt": as_text(tokenizer, prompt),
                    "expected": as_text(tokenizer, expected),
                }
                self._prompts.append((prompt, texts))
            return
        encoder = ChatEncoder(tokenizer)
        is_text = rows.stats.template == "none"
        for text in asked:
            prompt = (
                encoder.text_ids(text)
                if is_text
                else encoder.prompt_ids([{"role": "user", "content": text}])
            )
            check_vocabulary(max(prompt, default=0), tokenizer, model, "train.samples")
            self._prompts.append((prompt, {"prompt": text}))

    def evaluating(self, state: TrainState) -> None:
        self._answers = state.samples = self.answers(state.samples)

    def evaluated(self, record: Record) -> None:
        record["samples"] = self._answers

    @torch.no_grad()
    def answers(self, earlier: Sequence[Sample]) -> list[Sample]:
        """Answer every prompt, with dropout off and no random number drawn; ``earlier`` are the answers before."""
        before = {sample["prompt"]: sample["before"] for sample in earlier}
        with modes_kept(self._model):
            self._model.eval()
            texts = [
                answer(self._model, self._tokenizer, prompt, self._stop, is_sharded=self._is_sharded)
                for prompt, _ in self._prompts
            ]
        return [
            {**about, "before": before.get(about["prompt"], text), "answer": text}
            for (_, about), text in zip(self._prompts, texts, strict=True)
        ]
