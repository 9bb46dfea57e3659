"""An answer token by token, as each is computed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_native.errors import UserError
from qlora_native.models.decode import static_cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: among the ``top_k`` likeliest (0: all), and of these among the likeliest that
    together have the probability ``top_p``, with the logits divided by ``temperature`` (0: the likeliest every time).
    The same seed gives the same answer on the same machine.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        for name, least in {"temperature": 0, "top_k": 0, "max_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected {least} or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0 and at most 1")


def iter_tokens(
    model: Any, prompt: Sequence[int], sampling: Sampling, stop: set[int]
) -> Iterator[int]:
    """The answer's tokens, without the one of ``stop`` that ends it, as far as the model's context reaches.

    UserError if the prompt alone is longer.
    """
    context = (
        getattr(model.config, "max_position_embeddings", None) or len(prompt) + sampling.max_tokens
    )
    if len(prompt) >= context:
        raise UserError(
            f"the conversation has {len(prompt)} tokens, the model's context {context}: begin a new one"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    # Of a long prompt, only the logits of the last token are needed.
    parameters = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    # The name depends on the version of transformers.
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    count = min(sampling.max_tokens, context - len(prompt))
    ids: Any = torch.tensor([list(prompt)], device=model.device)
    cache: Any = static_cache(model, len(prompt) + count)
    for _ in range(count):
        output = model(input_ids=ids, **{cache_name: cache}, use_cache=True, **last)
        token = choose(output.logits[0, -1], sampling, generator)
        if token in stop:
            return
        yield token
        ids, cache = torch.tensor([[token]], device=model.device), getattr(output, cache_name)


stream = torch.inference_mode()(iter_tokens)  # a model that goes on training must not keep its tensors


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token, given logits [vocabulary] on any device. The likeliest is found there; a number is drawn on the host, so
    that a seed gives the same answer on each device."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    values, tokens = (logits.float().cpu() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        values, tokens = values[: sampling.top_k], tokens[: sampling.top_k]
    chances = values.softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances.where(before < sampling.top_p, 0.0)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer by the configs of the model and the tokenizer."""
    found: set[int] = set()
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if wrong := [token for token in ids if type(token) is not int]:
            raise UserError(
                f"eos_token_id of the model or its tokenizer is {wrong[0]!r}: expected a token's number."
            )
        found |= set(ids)
    return found
