"""Adapters put into a model, read into it, saved with it and taken out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.errors import UserError, say_once
from qlora_native.lora.adapter import copy_into, gathered, parameters_of, read_adapter, save_adapter
from qlora_native.lora.config import LoraConfig
from qlora_native.lora.layer import LoRALinear, end_training_rows, lora_layers, train_modules
from qlora_native.lora.targets import embeddings, saved_modules, select_targets, token_modules
from qlora_native.lora.tokens import TokenRows, WithTokenRows
from qlora_native.nn.experts import substitute_class


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Put an adapter beside the linear layers that ``config`` targets, and freeze everything else.

    Args:
        model: from :func:`qlora_native.load_model`, or any module with linear layers; changed in place.
        config: see :class:`LoraConfig`. It stays with the model as ``model.lora_config``.

    Returns:
        The model. Its trainable parameters are the fp32 ``lora_A`` and ``lora_B``, those of ``modules_to_save`` and the
        rows of ``trainable_tokens``.

    Raises:
        ValueError: the model has an adapter already; a name that no linear layer has (the message lists near matches).
    """
    targets = select_targets(model, config)
    generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    scales = {path: (config.rank_of(path), config.scale_of(path)) for path in targets}
    insert(model, scales, config, generator)
    return model


def insert(
    model: nn.Module,
    targets: dict[str, tuple[int, float]],
    config: LoraConfig,
    generator: torch.Generator | None,
    beside: bool = False,
) -> None:
    """Wrap the layers of ``targets`` (path -> rank, scale) and set what is trainable. ``beside`` allows a model with
    adapters of other layers."""
    if not beside and dict(lora_layers(model)):
        raise ValueError("the model has an adapter already: merge it, or load the model again.")
    saved = saved_modules(model, config.modules_to_save)
    chosen = token_modules(model, config.trainable_tokens)
    if both := chosen.keys() & {*saved, *targets}:
        raise ValueError(
            f"trainable_tokens has tokens of {min(both)}, which modules_to_save or target_modules trains whole: leave "
            "out the tokens or the module."
        )
    last = max((max(ids) for _, ids in chosen.values()), default=-1)
    if chosen and last >= min(len(part.weight) for part, _ in chosen.values()):  # type: ignore[arg-type]
        _grow(model, last + 1)
    layers = {
        path: LoRALinear(model.get_submodule(path), rank, scale, config.dropout, generator)  # type: ignore[arg-type]
        for path, (rank, scale) in targets.items()
    }
    model.requires_grad_(False)  # nothing has changed before all layers are made
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    train_modules(saved.values())
    made: dict[Tensor, TokenRows] = {}  # by the weight, which tied modules share
    for module, ids in chosen.values():
        weight: Any = module.weight
        module.token_adapter = made.setdefault(weight, TokenRows(weight, ids))
        module.__class__ = substitute_class(WithTokenRows, type(module))
    if hasattr(model, "save_pretrained") and "lora_config" not in model.__dict__:
        model.save_pretrained = partial(save_pretrained, model, model.__dict__.get("save_pretrained"))  # type: ignore[assignment]
    model.lora_config = config  # type: ignore[assignment]


@torch.no_grad()
def _grow(model: Any, rows: int) -> None:
    """Give the embeddings of the model more rows, the mean of the others, up to so many."""
    grown: dict[Tensor, nn.Parameter] = {}
    for module in embeddings(model):
        weight: Any = module.weight
        if weight not in grown:
            more = weight.mean(0, dtype=torch.float32).to(weight.dtype).expand(rows - len(weight), -1)
            grown[weight] = nn.Parameter(torch.cat([weight, more]), requires_grad=False)
        module.weight = grown[weight]
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)
    model.vocab_size = model.config.get_text_config().vocab_size = rows


def unload_adapter(model: nn.Module) -> nn.Module:
    """Take the adapter out: the model is its frozen base again, but for ``modules_to_save``, which keep their values.

    They stay fp32. Another adapter can then be loaded or added. :func:`adapters_off` turns the adapter off for a while.
    """
    for path, layer in list(lora_layers(model)):
        model.set_submodule(path, layer.base_layer)
    end_training_rows(model)
    model.__dict__.pop("lora_config", None)
    saving = model.__dict__.get("save_pretrained")
    if isinstance(saving, partial) and len(saving.args) == 2:  # that of insert()
        del model.save_pretrained
        if saving.args[1] is not None:  # the one that refuses to write the weights of a GGUF file
            model.save_pretrained = saving.args[1]
    return model.requires_grad_(False)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Read an adapter in PEFT's format into the model.

    A model without an adapter gets one, trainable as after :func:`add_lora`; into a model that has one of the same
    layers, rank and scale, the values are copied, with a warning if that one was trained or loaded. rsLoRA, rank and
    alpha patterns, ``modules_to_save`` and ``trainable_token_indices`` are honored.

    Args:
        model: the base that the adapter was trained on; changed in place.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The model.

    Raises:
        UserError: a file is missing or broken; the adapter is for another model or another rank; it uses something
            (DoRA, trained biases, ...) that this library does not compute. The model is then unchanged.
    """
    stored = read_adapter(model, folder)
    if not dict(lora_layers(model)):
        layers = {path: (len(a), scale) for path, (a, _, scale) in stored.pairs.items()}
        try:
            # The values come next; torch's own stays put.
            insert(model, layers, stored.config, torch.Generator())
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
    elif any(gathered(layer.lora_B).any() for _, layer in lora_layers(model)):
        warnings.warn(
            f"load_adapter: the adapter in {folder} takes the place of the one that the model has.",
            stacklevel=2,
        )
    for path, layer in lora_layers(model):
        copy_into(layer.lora_A, stored.pairs[path][0])
        copy_into(layer.lora_B, stored.pairs[path][1])
    for name, target in parameters_of(folder, model, stored.saved).items():
        copy_into(target, stored.saved[name])
    return model


def save_pretrained(
    model: Any,
    without_adapter: Callable[..., None] | None,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """transformers' method for a model with an adapter: write the adapter, not weights that nothing could load."""
    if not dict(lora_layers(model)):  # merged since
        save = without_adapter or partial(type(model).save_pretrained, model)
        save(save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
        return
    if options.get("push_to_hub"):
        raise ValueError(
            "save_pretrained: push_to_hub=True takes no adapter: call model.push_to_hub(repo_id) instead."
        )
    if is_main_process:
        say_once(
            "save_pretrained writes the adapter alone, in PEFT's format: after qlora_native.merge(model) it writes a "
            "whole model."
        )
    save_adapter(model, save_directory, write=is_main_process, state_dict=state_dict)
