"""Answers at each evaluation, to prompts or to the first held-out rows: short, of the likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.template import ChatEncoder, check_vocabulary
from qlora_native.hf.fuse import modes_kept
from qlora_native.hf.generate import Sampling, iter_tokens, stop_tokens

LONGEST = 64  # tokens of an answer
Sample = dict[str, str]  # prompt, expected (of a held-out row), before (the first answer of the run), answer


class Samples:
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
        self._stop, self._prompts = stop_tokens(model, tokenizer), list[tuple[list[int], Sample]]()
        if isinstance(asked, int):
            for row in held_out[:asked]:
                ids, is_trained = row["input_ids"], row["labels"] >= 0
                first = int(is_trained.argmax())
                first = first if first > 1 else len(ids) // 2  # half of a row that is trained as a whole
                length = int(np.append(is_trained[first:], False).argmin())  # of its first answer
                prompt, expected = ids[:first].tolist(), ids[first : first + min(length, LONGEST)]
                self._prompts.append((prompt, {"prompt": self._text(prompt), "expected": self._text(expected)}))
            return
        encoder = ChatEncoder(tokenizer)
        for text in asked:
            message, is_text = {"role": "user", "content": text}, rows.stats.template == "none"
            prompt = encoder.text_ids(text) if is_text else encoder.prompt_ids([message])
            check_vocabulary(max(prompt, default=0), tokenizer, model, "train.samples")
            self._prompts.append((prompt, {"prompt": text}))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @torch.no_grad()
    def answers(self, earlier: Sequence[Sample]) -> list[Sample]:
        """Answer every prompt, with dropout off and no random number drawn; ``earlier`` are the answers before."""
        before = {sample["prompt"]: sample["before"] for sample in earlier}
        with modes_kept(self._model):
            self._model.eval()
            texts = [self._answer(prompt) for prompt, _ in self._prompts]
        found = zip((about for _, about in self._prompts), texts, strict=True)
        return [{**about, "before": before.get(about["prompt"], text), "answer": text} for about, text in found]

    def _answer(self, prompt: list[int]) -> str:
        # Processes that share a model take the same number of passes, even if one rounds to another token.
        stop = set() if self._is_sharded else self._stop
        tokens = iter_tokens(self._model, prompt, Sampling(max_tokens=LONGEST), stop)
        return self._text([*takewhile(lambda token: token not in self._stop, [*tokens])])
