"""What a forward pass does with each linear layer of a model: which may be 4-bit, and which an adapter can train.

A second model of the same config is built, whose parameters are windows of a million random numbers and take no memory
at any size; its linear layers return noise without multiplying. A few tokens run forward and backward.
"""

from __future__ import annotations

import copy
import inspect
import re
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from qlora_native.nn.experts import STACKS, Substitute

# In these families every linear layer is plain and trains, and no code reads its weight.
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
_NUMBERS = 1 << 20
# What a packed weight answers as the dense one does (AskedLinear).
_ASKED = {Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.device.__get__, Tensor.size}  # type: ignore[attr-defined]


class Use(NamedTuple):
    """Whether a linear layer may be 4-bit, whether "all-linear" adapts it, and why not."""

    four_bit: bool
    adapted: bool
    why: str = ""


USED = Use(True, True)
UNUSED = Use(True, False, "no output depends on it, but for the choice of experts or tokens")
OTHER = Use(False, False, "its forward is no plain product")
READ = Use(False, False, "other code reads its weight")

_found: dict[tuple[type, str], tuple[dict[str, Use], str]] = {}


def probe(model: nn.Module) -> tuple[dict[str, Use], str]:
    """The use of each linear layer by its path, and "" or why no pass showed it.

    A pass runs once a process for a class and config of transformers. Where it fails, and for models of other libraries
    and families that need none, the sources decide.
    """
    kind = type(model)
    config: Any = getattr(model, "config", None)
    found: tuple[dict[str, Use], str] = {}, ""
    while issubclass(kind, Substitute):
        kind = kind.__bases__[1]
    with torch.device("cpu"), torch.random.fork_rng([]):
        if hasattr(kind, "_from_config") and config.model_type not in _PLAIN:
            config = copy.deepcopy(config)
            vars(config).pop("quantization_config", None)
            config.dtype = torch.float32
            key = kind, config.to_json_string(use_diff=False)
            if key not in _found:
                try:
                    _found[key] = _run(kind, config), ""
                except Exception as error:  # whatever unknown code raises, a missing package among it
                    _found[key] = {}, f"{type(error).__name__}: {error}".splitlines()[0]
            found = _found[key]
        return found[0] or {path: _by_source(model, path) for path in _linears(model)}, found[1]


def kind_of(path: str) -> str:
    """The path with ``*`` in place of numbers, which layers of one kind share."""
    return re.sub(r"\b\d+\b", "*", path)


def stacks(model: nn.Module) -> list[str]:
    """The names of the stacks of experts, 4-bit or not."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in STACKS
        if name in module._parameters
    ]


def _linears(model: nn.Module) -> dict[str, Any]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def _run(kind: Any, config: Any) -> dict[str, Use]:
    if rates := getattr(config, "compress_rates", None):  # of windows, which the tokens have to fill
        config.compress_rates = dict.fromkeys(rates, 4)
    with torch.device("meta"):
        model = kind._from_config(config)
    linears, seeds = _linears(model), dict[str, Tensor]()
    numbers = torch.randn(_NUMBERS)

    def product(seed: Tensor, out_features: int, x: Tensor) -> Tensor:
        return x[..., :1] + numbers[:out_features] + seed

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model.initialize_weights()  # gives buffers their values; parameters have none on the meta device
    for path, module in model.named_modules():
        if path in linears and _is_product(module):
            seeds[path] = torch.zeros((), requires_grad=True)
            out_features = vars(module).get("nf") or module.out_features
            module.forward = partial(product, seeds[path], out_features)
        elif any(name in module._parameters for name in STACKS):
            module.forward = lambda x, *_, **__: x * 2
        if "chunk_size" in vars(module):  # scans compute whole chunks
            module.chunk_size = 16
        for name, weight in module.named_parameters(recurse=False):
            strides = weight.stride() if weight.numel() <= _NUMBERS else [1] * weight.dim()
            module._parameters[name] = _Watched(numbers.as_strided(weight.shape, strides), False)
    tokens = torch.arange(3, 15)[None]
    # Which functions depend on which is asked, so no values are kept for backward.
    nothing_kept = saved_tensors_hooks(
        lambda x: (x.shape, x.dtype), lambda x: torch.zeros(x[0], dtype=x[1])
    )
    with torch.enable_grad(), nothing_kept:
        model.train()(tokens, use_cache=False)[0].sum().backward()
    with torch.no_grad():  # generation, with a cache, has other branches
        model.eval()(tokens)

    def use(path: str) -> Use:
        if path not in seeds:
            return OTHER
        if linears[path].weight.is_read:
            return READ
        return UNUSED if seeds[path].grad is None else USED

    return {path: use(path) for path in linears}


class _Watched(nn.Parameter):
    """A parameter that is marked as read by functions of it other than those of its dtype, shape and device."""

    is_read = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for part in tree_leaves((args, kwargs)):
            if isinstance(part, cls) and function not in _ASKED:
                part.is_read = True
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _is_product(module: Any) -> bool:
    """Whether the layer computes x W^T + b: by torch's forward, over a packed weight, or on numbers without a bias."""
    kind = type(module)
    is_packed = not module._parameters["weight"].is_floating_point()
    if kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D" or is_packed:
        return True
    x, weight = torch.arange(10.0).view(2, 5), torch.arange(15.0).view(3, 5)
    twin = copy.copy(module)
    twin._parameters = {"weight": weight, "bias": None}
    try:
        return torch.equal(twin.forward(x), nn.functional.linear(x, weight))
    except Exception:  # it takes or returns something else
        return False


def _by_source(model: nn.Module, path: str) -> Use:
    """Whether the parent's code uses the weight itself, as Mamba does ``self.dt_proj.weight``.

    Slices are taken only where tensor parallelism is imitated, which is off by default; ``init.normal_(self.x.weight)``
    is no use.
    """
    if not _is_product(model.get_submodule(path)):
        return OTHER
    used = r"(?<!isinstance\()(?<!_\()WEIGHT(?!\[|\.(dtype|device|shape)\b)"
    return READ if _has(model, path, used) else USED


def is_asked_for_dtype(model: nn.Module, path: str) -> bool:
    """Whether the parent's code has ``self.x.weight.dtype`` of this layer, as DeepSeek-V3.2's indexer casts to it."""
    return _has(model, path, r"WEIGHT\.dtype\b")


def _has(model: nn.Module, path: str, pattern: str) -> bool:
    """Whether the source of the layer's parent has the pattern, in which WEIGHT stands for the layer's weight."""
    parent, _, name = path.rpartition(".")
    pattern = pattern.replace("WEIGHT", rf"self\.{name}\.weight\b")
    return re.search(pattern, _source_of(type(model.get_submodule(parent)))) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _source_of(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""
