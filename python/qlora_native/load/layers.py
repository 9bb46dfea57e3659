"""Which weights of a model become 4-bit, and the exchange of one for its 4-bit form."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..integrations.experts import QuantizedExperts, put_stack, quantized_stacks, stacks_of, take_stack
from ..nn import QuantizedLinear
from ..weight import QuantizedWeight

OUTPUT_EMBEDDING = "lm_head"


def four_bit_weights(
    model: PreTrainedModel, skip_modules: Iterable[str], block_size: int, in_fp32: Callable[[str], object]
) -> dict[str, bool]:
    """The parameters that may become 4-bit, by name, and whether the model stores them transposed, as [in, out].

    These are the weights of every plain linear and the stacks of fused experts, but for tied ones, those that
    ``in_fp32`` keeps, and those under the modules that ``skip_modules`` names. A name there stands for the module of
    that path or path ending, and all under it; ``"lm_head"`` also for the output embedding of models that call it
    otherwise. Raises ValueError for a name that stands for nothing.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    skip = list(skip_modules)
    names = [name for name, _ in model.named_modules() if name]
    for entry in skip:
        if entry != OUTPUT_EMBEDDING and not any(_stands_for(entry, name) for name in names):
            near = get_close_matches(entry, {*names, *(name.rpartition(".")[2] for name in names)}, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ValueError(f"skip_modules: {type(model).__name__} has no module {entry!r}{hint}")
    output = model.get_output_embeddings() if OUTPUT_EMBEDDING in skip else None
    chosen = {
        f"{path}.weight": not isinstance(module, nn.Linear)
        for path, module in model.named_modules()
        if is_plain_linear(module)
        and module is not output
        and not any(_stands_for(entry, path) for entry in skip)
        and not _is_read_raw(model, path)
    }
    for path, name, _ in stacks_of(model, block_size):
        if not any(_stands_for(entry, path) for entry in skip):
            chosen[f"{path}.{name}"] = False
    return {name: transposed for name, transposed in chosen.items() if name not in tied and not in_fp32(name)}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module's forward is x W^T + b; a subclass of nn.Linear may compute something else (routers do)."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def put_four_bit(model: nn.Module, name: str, weight: QuantizedWeight, transposed: bool) -> Tensor:
    """Exchange the linear, or the stack of experts, whose parameter is ``name`` for its 4-bit form.

    ``weight`` is [out, in], or [experts, out, in]; ``transposed`` says that the model stores it as [in, out] (GPT-2's
    Conv1D). Returns the parameter that now has that name.
    """
    path, _, leaf = name.rpartition(".")
    old = model.get_submodule(path)
    if leaf != "weight":
        put_stack(old, leaf, weight)
        layer = old
    elif isinstance(old, QuantizedLinear):
        old.quantized = weight
        layer = old
    else:
        layer = QuantizedLinear.from_quantized(weight)
        if old.bias is not None:
            layer.bias = old.bias  # type: ignore[assignment]
        layer.fan_in_fan_out = transposed  # type: ignore[assignment]  # merging gives the layer back as it was
        layer.train(old.training)
        model.set_submodule(path, layer)
    layer._is_hf_initialized = True  # type: ignore[assignment]  # keeps transformers' initialization off it
    parameter: Tensor = getattr(layer, leaf)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def put_dense(model: nn.Module, path: str, inner: QuantizedLinear | nn.Linear, weight: Tensor) -> None:
    """Put the dense layer that ``inner`` stood for at ``path``: ``weight`` [out, in], and inner's bias."""
    if getattr(inner, "fan_in_fan_out", False):
        dense: nn.Module = Conv1D(1, 1)
        dense.nx, dense.nf = inner.in_features, inner.out_features  # type: ignore[assignment]
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(inner.in_features, inner.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.register_parameter("bias", inner.bias)
    model.set_submodule(path, dense.train(inner.training))


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Every 4-bit layer and stack as the dense one it stands for, with its decoded weight, one at a time."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            put_dense(model, path, module, module.quantized.dequantize(dtype))
    for _, experts, name, weight in list(quantized_stacks(model)):
        take_stack(experts, name, weight.dequantize(dtype))


def four_bit_parts(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Every 4-bit weight of the model by the name of its parameter."""
    parts = {
        f"{path}.weight": module.quantized
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    return parts | {f"{path}.{name}": weight for path, _, name, weight in quantized_stacks(model)}


def is_four_bit(model: nn.Module) -> bool:
    """Whether anything in the model is 4-bit."""
    return any(isinstance(module, (QuantizedLinear, QuantizedExperts)) for module in model.modules())


def patterns_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], object]:
    """Whether a name is of those that transformers keeps in fp32 when the model is loaded in ``dtype``."""
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    loose = model._keep_in_fp32_modules if dtype is torch.float16 else ()
    patterns = [pattern.replace("*", ".*") for pattern in {*(strict or ()), *(loose or ())}]
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)").search


def _is_read_raw(model: nn.Module, path: str) -> bool:
    """Whether the code of the parent takes the weight out of this layer, where packed bytes would break it.

    Mamba multiplies with ``self.dt_proj.weight``, some routers with ``self.classifier.weight``. A look at the dtype or
    the device does no harm, and slices are taken only where tensor parallelism is imitated, which is off by default.
    Being wrong here costs a layer its 4 bits, no more.
    """
    parent, _, name = path.rpartition(".")
    used = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\[|\.(dtype|device|shape)\b)"
    return re.search(used, _source_of(type(model.get_submodule(parent)))) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _source_of(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time: nothing to look at
        return ""


def _stands_for(entry: str, path: str) -> bool:
    return f".{entry}." in f".{path}."
