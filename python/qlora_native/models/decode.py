"""Generation by a CUDA graph a token: a pass of one token over a static cache is captured once and then replayed.

A loaded model looks at each of its forward passes (:class:`Decodes`), so this holds for whatever generates with it:
``qlora chat``, ``model.generate(cache_implementation="static")``, TRL's trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.utils import ModelOutput

from qlora_native.errors import say_once
from qlora_native.models.fuse import PLAIN
from qlora_native.models.graphs import Pool, rehearsed, why_not_captured
from qlora_native.nn.experts import Substitute, substitute_class
from qlora_native.ops import _library

if TYPE_CHECKING:
    from qlora_native.ops import _cuda_copies

EAGER_STEPS = 2  # before a capture; in the last of them the host's waits are looked for
CACHES = ("cache", "past_key_values")  # their name depends on the version of transformers
ALIGNMENT = 64  # tokens of a static cache: torch's attention copies a mask whose rows are not aligned

Inputs = Mapping[str, Any]


class Decodes(Substitute):
    """A causal language model on a CUDA device that keeps the copies of its adapters as long as a cache lives, and
    replays passes of one token over a static one."""

    @classmethod
    def members(cls, base: Any) -> dict[str, Any]:
        @wraps(base.forward)
        def forward(self: Any, *args: Any, **inputs: Any) -> Any:
            plain = base.forward  # which somebody may have replaced since
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
    if cache.offloading:
        return "layers of the cache are offloaded to the host"
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return "the host counts the tokens of a sliding window"
    return why_not_captured(model)


def _places(inputs: Inputs) -> list[int]:
    """Where a static cache lies: a beam search puts other tensors into it after each token."""
    layers = next(inputs[name].layers for name in CACHES if inputs.get(name) is not None)
    return [
        tensor.data_ptr()
        for layer in layers
        for tensor in vars(layer).values()
        if isinstance(tensor, Tensor)
    ]


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
        self.inputs: list[Any] = []  # those of the graph
        self.output: Any = None  # its kind and its logits

    def __call__(self, run: Callable[..., Any], inputs: Inputs) -> Any:
        # Its import puts a hook on all optimizers, which is for those on a card alone.
        from qlora_native.ops import _cuda_copies

        if not _cuda_copies.are_current(self.copies):
            self.copies.clear()
            self._begin(None)
        if getattr(inputs.get("input_ids"), "shape", ())[1:] != (1,):
            self._begin(None)  # a prompt: since the last one adapters may have been switched
        elif not self.is_eager:
            # Masks may come in a dict, one for each kind of layer.
            leaves, form = tree_flatten({k: v for k, v in inputs.items() if k not in CACHES})
            if all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
                with _cuda_copies.kept_in(self.copies):
                    return self._step(run, inputs, leaves, form)
            self._stop("a pass has other inputs than tensors and numbers")
        with _cuda_copies.kept_in(self.copies):
            return run(**inputs)

    def _step(self, run: Callable[..., Any], inputs: Inputs, leaves: list[Any], form: Any) -> Any:
        tensors = {at: leaf for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        shapes = [
            (leaf.shape, leaf.dtype) if at in tensors else leaf for at, leaf in enumerate(leaves)
        ]
        kind = shapes, form, _places(inputs), torch.is_inference_mode_enabled()
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
            self._capture(run, inputs, leaves, form)
        if self.graph is None:
            return run(**inputs)
        for at, tensor in tensors.items():
            self.inputs[at].copy_(tensor)
        self.graph.replay()
        make, logits = self.output
        caches = {name: inputs[name] for name in CACHES if name in inputs}
        return make(logits=logits.clone(), **caches)

    def _capture(self, run: Callable[..., Any], inputs: Inputs, leaves: list[Any], form: Any) -> None:
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        reason = ""
        try:
            # The current device is the thread's, and need not be the model's.
            with torch.cuda.device(inputs["input_ids"].device), Pool().captured() as graph:
                output = run(**{**inputs, **tree_unflatten(self.inputs, form)})
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
