"""Adapters added to the weights: a 4-bit model with an adapter becomes a plain 16-bit model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import integrations
from ..errors import UserError
from ..integrations.experts import quantized_stacks, take_stack
from ..lora import LoRALinear
from ..lora.config import ZERO
from ..lora.layer import trained_whole
from ..nn import QuantizedLinear
from .layers import put_dense
from .model import LoadReport, make_report
from .source import open_source
from .taker import DTYPES
from .tree import Tree

BASES = ("original", "dequantized")


def merge(model: PreTrainedModel, base: str = "original", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Turn the model into dense layers with W + scale * B A, the sum taken in fp32 and rounded once to ``dtype``.

    Layers without an adapter become dense as well, so the result is an ordinary transformers model for
    ``save_pretrained``; GPT-2's transposed layers are what they were.

    Args:
        model: from :func:`qlora_native.load_model`, with an adapter or without; changed in place, layer by layer.
        base: the W: "original" reads the 16-bit weights again from where the model was loaded, one tensor at a time;
            "dequantized" takes the 4-bit ones, which are what the adapter was trained on.
        dtype: of the whole result: bfloat16, float16 or float32.

    Returns:
        The model, frozen.

    Raises:
        ValueError: a wrong argument; "original" for a model that was not loaded by load_model, or with an adapter that
            began with what 4 bits lost, which the original weights have not lost.
        UserError: the original weights are gone, or are 4-bit themselves.
    """
    if base not in BASES:
        raise ValueError(f"merge: base is {base!r}: expected 'original' or 'dequantized'.")
    if dtype not in DTYPES:
        raise ValueError(f"merge: dtype is {dtype}: expected torch.bfloat16, torch.float16 or torch.float32.")
    report: LoadReport | None = getattr(model, "load_report", None)
    has_stacks = any(True for _ in quantized_stacks(model))
    if base == "original":
        config = model.__dict__.get("lora_config")
        if config is not None and config.init != ZERO:
            raise ValueError(
                f"merge: the adapter began with init {config.init!r}, which corrects the 4-bit weights: expected "
                "base='dequantized'."
            )
        if report is None:
            raise ValueError("merge: the model was not loaded by load_model: expected base='dequantized'.")
        _from_original(model, report, dtype)
    else:
        for path, layer in list(_layers(model)):
            inner = _inner(layer)
            if isinstance(inner, QuantizedLinear):
                _make_dense(model, path, layer, inner.quantized.dequantize(torch.float32), dtype)
            else:
                _make_dense(model, path, layer, inner.weight, dtype)
        for _, experts, name, weight in list(quantized_stacks(model)):
            take_stack(experts, name, weight.dequantize(dtype))
    if has_stacks:
        model.__dict__.pop("_weight_conversions", None)  # transformers' own for this class: experts one by one again
    integrations.unfuse(model)
    loaded_as = model.config.dtype
    for parameter in model.parameters():
        if parameter.dtype == loaded_as:  # what is kept in fp32 stays so
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("lora_config", None)
    if report is not None:
        model.load_report = make_report(model, report.path)
    return model.requires_grad_(False)


def _from_original(model: PreTrainedModel, report: LoadReport, dtype: torch.dtype) -> None:
    source = open_source(report.path, dtype)
    tree = Tree(source.config, dtype, torch.device("cpu"))
    if source.is_four_bit(tree):
        raise UserError(f"{report.path} holds 4-bit weights and no original ones: merge with base 'dequantized'.")
    layers = {f"{path}.weight": (path, layer) for path, layer in _layers(model)}
    stacks = {f"{path}.{name}": (experts, name, weight) for path, experts, name, weight in quantized_stacks(model)}
    parameters = {name.replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()}
    config = model.__dict__.get("lora_config")
    trained = tuple(f"{path}." for path in trained_whole(model, config.modules_to_save)) if config else ()

    def is_wanted(name: str) -> bool:
        """Layers to replace, and whatever the model holds in a dtype that loses something against the files."""
        parameter = parameters.get(name)
        return (
            name in layers
            or name in stacks
            or (parameter is not None and parameter.dtype != tree.dtype_of(name) and not name.startswith(trained))
        )

    absent = {*layers, *stacks}
    tied_to = {tree.tied[name]: name for name in layers if name in tree.tied}  # of which a file may hold one
    for name, value, _ in source.arrivals(tree, lambda n: is_wanted(n) or n in tied_to, lambda name, stored: True):
        assert isinstance(value, Tensor)
        absent.discard(name)
        if name in tied_to:
            absent.discard(tied_to[name])
            _make_dense(model, *layers[tied_to[name]], value, dtype)
            if not is_wanted(name):
                continue
        if name in stacks:
            experts, leaf, weight = stacks[name]
            if value.shape != weight.shape:
                raise _changed(report, f"{name} is {list(value.shape)} there now")
            take_stack(experts, leaf, value.to(weight.device, dtype, copy=True))
            continue
        if name not in layers:
            parameters[name].data = value.to(parameters[name].device, tree.dtype_of(name), copy=True)
            continue
        path, layer = layers[name]
        if isinstance(tree.model.get_submodule(path), Conv1D):
            value = value.t()
        if tuple(value.shape) != (_inner(layer).out_features, _inner(layer).in_features):
            raise _changed(report, f"{name} is {list(value.shape)} there now")
        _make_dense(model, path, layer, value, dtype)
    if absent:
        raise _changed(report, f"{sorted(absent)[0]} is no longer there")


def _changed(report: LoadReport, what: str) -> UserError:
    return UserError(f"{report.path} has changed since the model was loaded: {what}; load the model again.")


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | QuantizedLinear]]:
    """The layers that become dense: adapted ones, and 4-bit ones without an adapter."""
    adapted = ""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            adapted = f"{path}.base_layer"
            yield path, module
        elif isinstance(module, QuantizedLinear) and path != adapted:
            yield path, module


def _inner(layer: LoRALinear | QuantizedLinear) -> nn.Linear:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


@torch.no_grad()
def _make_dense(
    model: PreTrainedModel, path: str, layer: LoRALinear | QuantizedLinear, weight: Tensor, dtype: torch.dtype
) -> None:
    """Put a dense layer of ``weight`` [N, K], plus the adapter's delta, at ``path``."""
    inner = _inner(layer)
    device = inner.weight.device
    if isinstance(layer, LoRALinear):
        total = layer.delta().add_(weight.to(device)).to(dtype)
        if f"{path}.weight" in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
            model.config.tie_word_embeddings = False  # one of the two has changed
            model.all_tied_weights_keys = {}
    else:
        total = weight.to(device, dtype, copy=True)
    put_dense(model, path, inner, total)
