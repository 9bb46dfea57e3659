"""Generation by a CUDA graph a token: a pass of one token over a static cache is captured once and then replayed.

A loaded model looks at each of its forward passes (:class:`Decodes`), so this holds for whatever generates with it:
``qlora chat``, ``model.generate(cache_implementation="static")``, TRL's trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.utils import ModelOutput

from qlora_native.errors import say_once
from qlora_native.models.fuse import PLAIN
from qlora_native.models.graphs import Pool, rehearsed, why_not_captured
from qlora_native.nn.experts import Substitute, substitute_class
from qlora_native.ops import _cuda_copies, _library

EAGER_STEPS = 2  # before a capture; in the last of them the host's waits are looked for
CACHES = ("cache", "past_key_values")  # their name depends on the version of transformers
ALIGNMENT = 64  # tokens of a static cache: torch's attention copies a mask whose rows are not aligned

Inputs = Mapping[str, Any]


class Decodes(Substitute):
    """A causal language model on a CUDA device that keeps the copies of its adapters as long as a cache lives, and
    replays passes of one token over a static one."""

    @classmethod
    def members(cls, base: Any) -> dict[str, Any]:
        plain = base.forward

        @wraps(plain)
        def forward(self: Any, *args: Any, **inputs: Any) -> Any:
            if args or torch.compiler.is_compiling() or torch.is_grad_enabled():
                return plain(self, *args, **inputs)
            run = partial(plain, self)
            passes = _passes_over(self, inputs)
            return run(**inputs) if passes is None else passes(run, inputs)

        return {"forward": forward}

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What ``generate`` takes with a static cache: compiled only if somebody says how."""
        if compile_config is None:
            return self.__call__
        return super().get_compiled_call(compile_config)  # type: ignore[misc]


def decode_by_graphs(model: Any) -> None:
    """Have a model generate so; on a CPU nothing changes."""
    model.__class__ = substitute_class(Decodes, type(model))


def static_cache(model: Any, length: int) -> StaticCache | None:
    """A cache for ``length`` tokens over which ``model`` is replayed; None for a model that is not."""
    if not isinstance(model, Decodes) or not getattr(model, "_can_compile_fullgraph", False):
        return None
    cache = StaticCache(model.config, max_cache_len=-(-length // ALIGNMENT) * ALIGNMENT)
    return cache if _why_eager(model, cache) is None else None


def _why_eager(model: Any, cache: Cache) -> str | None:
    """Why passes over a cache are not captured, "" where nobody would expect it; None if they are."""
    if not isinstance(cache, StaticCache):
        return ""
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return "the host counts the tokens of a sliding window"
    return why_not_captured(model)


class DecodePasses:
    """Passes over one cache, at whose end their graph ends, too; ``reason``: why they are all eager."""

    def __init__(self, reason: str | None) -> None:
        self.is_eager = reason is not None
        if reason:
            _say(reason)
        self.copies: _cuda_copies.Kept = {}
        self._begin(None)

    def _begin(self, kind: Any) -> None:
        """From here on passes have inputs of this kind; none has been seen."""
        self.kind, self.count = kind, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Tensor] = {}  # those of the graph
        self.output: Any = None  # its kind and its logits

    def __call__(self, run: Callable[..., Any], inputs: Inputs) -> Any:
        if not _cuda_copies.are_current(self.copies):
            self.copies.clear()
            self._begin(None)
        others = {name: value for name, value in inputs.items() if name not in CACHES}
        is_plain = all(isinstance(value, (Tensor, *PLAIN)) for value in others.values())
        is_one = getattr(inputs.get("input_ids"), "shape", ())[1:] == (1,)
        with _cuda_copies.kept_in(self.copies):
            if self.is_eager or not (is_one and is_plain):
                return run(**inputs)
            return self._step(run, inputs, others)

    def _step(self, run: Callable[..., Any], inputs: Inputs, others: Inputs) -> Any:
        tensors = {name: value for name, value in others.items() if isinstance(value, Tensor)}
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        kind = {**others, **shapes}, torch.is_inference_mode_enabled()
        if kind != self.kind:
            self._begin(kind)
        self.count += 1
        if self.count == EAGER_STEPS:
            with rehearsed() as waits:
                output = run(**inputs)
            if waits:
                self._stop(f"the host waits for the device in {waits[0]}")
            return output
        if self.graph is None and self.count > EAGER_STEPS:
            self._capture(run, inputs, tensors)
        if self.graph is None:
            return run(**inputs)
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        make, logits = self.output
        caches = {name: inputs[name] for name in CACHES if name in inputs}
        return make(logits=logits.clone(), **caches)

    def _capture(self, run: Callable[..., Any], inputs: Inputs, tensors: dict[str, Tensor]) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        reason = ""
        try:
            with Pool().captured() as graph:
                output = run(**{**inputs, **self.inputs})
                if not isinstance(output, ModelOutput) or {*output} - {"logits", *CACHES}:
                    raise RuntimeError("the model returns more than logits")
            self.graph, self.output = graph, (type(output), output["logits"])
        except RuntimeError as error:
            reason = str(error.__context__ or error).splitlines()[0]
        if reason:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        self.is_eager = True
        self._begin(None)
        _say(reason)


def _say(reason: str) -> None:
    say_once(f"qlora_native: tokens are generated without CUDA graphs: {reason}.")


_passes: WeakKeyDictionary[Cache, DecodePasses] = WeakKeyDictionary()


def _passes_over(model: Any, inputs: Inputs) -> DecodePasses | None:
    """Those over the cache among the inputs; None without one, and on a device without our kernels."""
    cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
    if not isinstance(cache, Cache) or _library.module_for(model.device) is None:
        return None
    if cache not in _passes:
        _passes[cache] = DecodePasses(_why_eager(model, cache))
    return _passes[cache]
