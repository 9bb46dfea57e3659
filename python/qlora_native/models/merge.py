"""Adapters added to the weights: a 4-bit model with an adapter becomes a plain 16-bit model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_native.errors import UserError
from qlora_native.lora import LoRALinear
from qlora_native.lora.layer import end_training_modules, end_training_rows
from qlora_native.lora.targets import saved_modules
from qlora_native.lora.tokens import put_rows, token_rows
from qlora_native.models.build import put_dense
from qlora_native.models.fuse import unfuse
from qlora_native.models.load import LoadReport, make_report
from qlora_native.nn.experts import QuantizedExperts, quantized_stacks, take_stack
from qlora_native.nn.linear import QuantizedEmbedding, QuantizedLinear
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import MODEL_DTYPES, ModelShapes
from qlora_native.weights.stream import Source, stream


def merge(
    model: PreTrainedModel, base: str = "original", dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
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
        ValueError: a wrong argument; "original" for a model that was not loaded by load_model.
        UserError: the original weights are gone, or are 4-bit themselves.
    """
    if base not in ("original", "dequantized"):
        raise ValueError(f"merge: base is {base!r}: expected 'original' or 'dequantized'.")
    if dtype not in MODEL_DTYPES:
        raise ValueError(
            f"merge: dtype is {dtype}: expected torch.bfloat16, torch.float16 or torch.float32."
        )
    report: LoadReport | None = getattr(model, "load_report", None)
    config, rows = model.__dict__.get("lora_config"), token_rows(model)
    end_training_rows(model)
    adapted = {id(module.base_layer) for module in model.modules() if isinstance(module, LoRALinear)}
    layers: Layers = {
        f"{path}.weight": (path, layer, layer.base_layer if isinstance(layer, LoRALinear) else layer)
        for path, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
        or (isinstance(layer, QuantizedLinear) and id(layer) not in adapted)
    }
    stacks = {
        f"{path}.{name}": (experts, name, weight)
        for path, experts, name, weight in quantized_stacks(model)
    }
    if base == "dequantized":
        weights = _decoded(layers, stacks, dtype)
    elif report is None:
        raise ValueError("merge: the model was not loaded by load_model: expected base='dequantized'.")
    else:
        trained = (
            tuple(f"{path}." for path in saved_modules(model, config.modules_to_save))
            if config
            else ()
        )
        parameters = {
            name.replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()
        }
        parameters = {
            name: tensor
            for name, tensor in parameters.items()
            if not name.startswith(trained) and tensor.is_floating_point()
        }
        weights = _original(open_source(report.path), dtype, layers, stacks, parameters)
    for name, weight in weights:
        if name in layers:
            _make_dense(model, *layers[name], weight, dtype)
        else:
            experts, leaf, stack = stacks[name]
            take_stack(experts, leaf, weight.to(stack.device, dtype, copy=base == "original"))
    _make_embeddings_dense(model, dtype)
    if stacks:
        # This is transformers' own for the class: experts one by one again.
        model.__dict__.pop("_weight_conversions", None)
    end_training_modules(model)
    unfuse(model)
    for parameter in model.parameters():
        if parameter.dtype == model.config.dtype:  # what is kept in fp32 stays so
            parameter.data = parameter.data.to(dtype)
    for path, part in rows.items():
        weight = model.get_submodule(path).get_parameter("weight")
        weight.data = put_rows(weight.data, part.token_ids, part.trainable_tokens_delta.data)
    model.config.dtype = dtype
    model.config.__dict__.pop("quantization_config", None)
    # `save_pretrained` refuses while the weights are those of a GGUF file.
    for name in ("lora_config", "save_pretrained"):
        model.__dict__.pop(name, None)
    if report is not None:
        model.load_report = make_report(model, report.path)
    return model.requires_grad_(False)


# Path, layer, and the layer without adapter.
Layers = dict[str, tuple[str, "LoRALinear | QuantizedLinear", nn.Linear]]
Stacks = dict[str, tuple[QuantizedExperts, str, QuantizedWeight]]


def _decoded(layers: Layers, stacks: Stacks, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights by name as the model holds them; those of 4-bit layers in fp32, to which adapters are added."""
    for name, (_, _, inner) in layers.items():
        yield (
            name,
            inner.quantized.dequantize(torch.float32)
            if isinstance(inner, QuantizedLinear)
            else inner.weight,
        )
    for name, (*_, weight) in stacks.items():
        yield name, weight.dequantize(dtype)


def _original(
    source: Source, dtype: torch.dtype, layers: Layers, stacks: Stacks, parameters: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The weights by name as the files hold them. What else the model holds in a dtype that loses something against the
    files is read into ``parameters``."""
    if source.has_four_bit_weights:
        raise UserError(
            f"{source.path} holds 4-bit weights and no original ones: merge with base 'dequantized'."
        )
    meta = ModelShapes(source.config, dtype)
    absent = {*layers, *stacks}
    widened = {
        name
        for name in parameters.keys() & meta.shapes
        if parameters[name].dtype != meta.dtype_of(name)
    }
    widened -= absent
    # A file may hold one of these.
    tied_to = {meta.tied[name]: name for name in layers if name in meta.tied}

    def changed(what: str) -> UserError:
        return UserError(
            f"{source.path} has changed since the model was loaded: {what}; load the model again."
        )

    needed = absent | widened | tied_to.keys()
    items = (item for item in stream(source, meta) if not item.entry.is_plain or item.name in needed)
    for name, value in (pair for item in items for pair in item.values()):
        assert isinstance(value, Tensor)
        if name in tied_to:
            absent.discard(tied_to[name])
            yield tied_to[name], value
        if name in widened:
            parameters[name].data = value.to(parameters[name].device, meta.dtype_of(name), copy=True)
        if name not in layers and name not in stacks:
            continue
        absent.discard(name)
        value = value.mT if name in meta.transposed else value
        inner = layers[name][2] if name in layers else None
        if value.shape != (
            (inner.out_features, inner.in_features) if inner is not None else stacks[name][2].shape
        ):
            raise changed(f"{name} is {list(value.shape)} there now")
        yield name, value
    if absent:
        raise changed(f"{min(absent)} is no longer there")


@torch.no_grad()
def _make_dense(
    model: PreTrainedModel,
    path: str,
    layer: nn.Module,
    inner: nn.Linear,
    weight: Tensor,
    dtype: torch.dtype,
) -> None:
    """Put a dense layer of ``weight`` [N, K], plus the adapter's delta, at ``path``."""
    device = inner.weight.device
    if isinstance(layer, LoRALinear):
        total = layer.delta().add_(weight.to(device)).to(dtype)
        if f"{path}.weight" in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
            model.config.tie_word_embeddings = False  # one of the two has changed
            model.all_tied_weights_keys = {}
    else:
        total = weight.to(device, dtype, copy=True)
    put_dense(model, path, inner, total)


def _make_embeddings_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            dense = nn.Embedding.from_pretrained(module.quantized.dequantize(dtype))
            model.set_submodule(path, dense.train(module.training))
            for name, origin in model.all_tied_weights_keys.items():
                if origin == f"{path}.weight":
                    model.get_submodule(name.rpartition(".")[0]).weight = dense.weight
