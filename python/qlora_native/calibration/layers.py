"""The decoder layers of a causal LM, one by one: where they stand, and what transformers calls each of them with.

What a layer is called with (rotary tables, masks) is not rebuilt here: the model's own forward runs once for each
sequence, with stand-ins in place of the layers that hand the hidden states on and note the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.errors import UserError

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a layer beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: str  # of the argument that the hidden states are, or "" if they come first

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states [1, length, H] that the layer makes of those."""
        if self.by_name:
            out = layer(*self.args, **{self.by_name: hidden}, **self.kwargs)
        else:
            out = layer(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers and its path. UserError if there is no such list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():  # outer ones first
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise _unlike(model, f"it has no list of {count} decoder layers")


class _Stop(Exception):
    """The last stand-in has been called."""


class _HandedOn(Tensor):
    """Hidden states that also pass for the tuple that some layers return."""

    def __getitem__(self, index: Any) -> Any:
        return self if index == 0 else super().__getitem__(index)

    def __iter__(self) -> Any:
        return iter((self,))


class LayerCalls:
    """What the layers of one model are called with.

    The calls must be those of every sequence: layers that are given something made of the tokens are refused.
    """

    def __init__(self, model: Any, layers: nn.ModuleList) -> None:
        self._model, self._layers = model, layers
        self._calls: list[LayerCall] = []

    def __getitem__(self, index: int) -> LayerCall:
        return self._calls[index]

    @torch.no_grad()
    def first_input(self, ids: Tensor) -> Tensor:
        """The hidden states [1, length, H] that the first layer gets for ids [1, length].

        Raises UserError if the model's layers do not simply follow one another.
        """
        calls: list[LayerCall] = []
        entered: list[Tensor] = []
        with _stand_ins(self._model, self._layers, calls, entered), suppress(_Stop):
            self._model(input_ids=ids, use_cache=False)
        if len(calls) != len(self._layers):
            raise _unlike(self._model, f"{len(calls)} of its {len(self._layers)} layers are called")
        if not self._calls:
            self._calls = calls
        elif not all(map(_same, map(vars, self._calls), map(vars, calls))):
            raise _unlike(self._model, "what its layers are given depends on the tokens")
        return entered[0]


@contextmanager
def _stand_ins(model: Any, layers: nn.ModuleList, calls: list[LayerCall], entered: list[Tensor]) -> Iterator[None]:
    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            name = "" if args else next(iter(kwargs))
            hidden = args[0] if args else kwargs.pop(name)
            if index != len(calls):
                raise _unlike(model, f"layer {index} is called after {len(calls)} others")
            if entered and hidden.data_ptr() != entered[-1].data_ptr():
                raise _unlike(model, f"something is done to the hidden states before layer {index}")
            for key, value in [*enumerate(args[1:], 1), *kwargs.items()]:
                if not _is_plain(value):
                    raise _unlike(model, f"layer {index} is given {key}, a {type(value).__name__}")
            calls.append(LayerCall(args[1:], kwargs, name))
            entered.append(hidden.as_subclass(Tensor))
            if len(calls) == len(layers):
                raise _Stop
            return hidden.as_subclass(_HandedOn)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(value: Any) -> bool:
    """Whether the value can be given again: tensors and constants, but no cache that layers write to."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (Tensor, *_PLAIN))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return bool(one == other)


def _unlike(model: Any, what: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be calibrated layer by layer: {what}; load it with method 'rtn' or "
        "'rtn_signed', which need no data."
    )
