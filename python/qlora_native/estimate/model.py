"""A model as training holds it, on the meta device: 4-bit weights, adapters, no memory; from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_native.errors import UserError
from qlora_native.hf.build import OUTPUT_EMBEDDING, MetaModel, is_transposed
from qlora_native.hf.checkpoint import INDEX_NAME, WEIGHTS_NAME
from qlora_native.hf.load import make_report
from qlora_native.hf.plan import FourBit, Plain
from qlora_native.hf.source import GgufSource, SafetensorsSource, Source, four_bit_config, open_source, read_config
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.weight import quantize

if TYPE_CHECKING:
    from qlora_native.config import TrainConfig


@dataclass(frozen=True)
class Setting:
    """The settings of a training run on which its memory depends; most are named as in :class:`TrainConfig`."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,)
    dtype: torch.dtype = torch.bfloat16  # of activations and of what is not 4-bit
    lora: LoraConfig = field(default_factory=LoraConfig)
    batch_size: int = 4
    length: int = 1024  # tokens of the longest row
    micro_batches: int = 4  # of a step
    optimizer: str = "adamw"  # or "adamw8bit", "lion"
    paged: str | bool = "auto"
    page_budget: int | None = None
    checkpointing: bool = True
    device: str = "cpu"  # or "cuda"

    @property
    def quant_options(self) -> dict[str, Any]:
        """Arguments of :func:`qlora_native.quantize`."""
        return {"quant_type": self.quant_type, "block_size": self.block_size, "double_quant": self.double_quant}

    @classmethod
    def from_config(cls, config: TrainConfig, device: str) -> Setting:
        """That of a training run with rows of ``data.max_length`` tokens."""
        options = config.train
        return cls(
            **config.quant.options,
            dtype=getattr(torch, options.dtype),
            lora=config.lora.as_config(options.seed),
            batch_size=options.batch_size,
            length=config.data.max_length,
            micro_batches=options.grad_accum,
            optimizer=options.optimizer,
            paged=options.paged,
            page_budget=options.page_budget,
            checkpointing=options.grad_checkpointing,
            device=device,
        )


def meta_model(model: Path | Source | PreTrainedConfig, setting: Setting) -> tuple[PreTrainedModel, int]:
    """The model as it is trained, on the meta device, and the bytes that loading it holds beside it.

    Args:
        model: a folder (``config.json``, with or without weights), a GGUF file, an open source, or a config alone.

    Raises:
        UserError: as :func:`qlora_native.load_model`. ValueError: the model has no modules of the names given.
    """
    if isinstance(model, PreTrainedConfig):
        return _from_config(model, None, setting)
    if isinstance(model, Path):
        if (model / "config.json").is_file() and not _has_weights(model):
            config = read_config(model)
            return _from_config(config, four_bit_config(config, model), setting)
        model = open_source(model)
    meta = MetaModel(model.config, setting.dtype, torch.device("meta"))
    if isinstance(model, GgufSource):  # transformers' reader makes the whole 16-bit model first
        dense_bytes = sum(tensor.numel() for tensor in meta.shapes.values()) * setting.dtype.itemsize
        return _trained(meta, _chosen(meta, setting), setting, model.path), dense_bytes
    stored = {
        step.name: _stored_options(step, meta, setting) for step in model.plan(meta).steps if isinstance(step, FourBit)
    }
    options = stored or _chosen(meta, setting)
    largest = _largest_read(model, meta, options)
    return _trained(meta, options, setting, model.path), largest


def _from_config(
    config: PreTrainedConfig, four_bit: dict[str, Any] | None, setting: Setting
) -> tuple[PreTrainedModel, int]:
    """``four_bit`` is the config's description of weights that are 4-bit already."""
    if four_bit is not None:
        double = four_bit.get("double_quant", four_bit.get("bnb_4bit_use_double_quant", False))
        skip = four_bit.get("skip_modules", four_bit.get("llm_int8_skip_modules"))
        block = four_bit.get("block_size", 64)
        setting = replace(setting, double_quant=bool(double), block_size=block, skip_modules=tuple(skip or ()))
    meta = MetaModel(config, setting.dtype, torch.device("meta"))
    options = _chosen(meta, setting)
    largest = max((2 * meta.shapes[name].numel() for name in options), default=0)
    return _trained(meta, options, setting, Path()), largest


def _has_weights(folder: Path) -> bool:
    known = (WEIGHTS_NAME, INDEX_NAME)
    return any((folder / name).is_file() for name in known) or any(
        next(folder.glob(pattern), None) is not None for pattern in ("*.bin", "*.pth")
    )


Options = dict[str, dict[str, Any]]  # arguments of quantize for each 4-bit weight, by its name


def _chosen(meta: MetaModel, setting: Setting) -> Options:
    """For what loading quantizes."""
    return dict.fromkeys(meta.four_bit_weights(setting.skip_modules, setting.block_size), setting.quant_options)


def _trained(meta: MetaModel, options: Options, setting: Setting, path: Path) -> PreTrainedModel:
    """The model as loading leaves it, with its ``load_report``, and with adapters."""
    model = meta.model
    for name in options:
        parent = model.get_submodule(name.rpartition(".")[0])
        dense = meta.shapes[name].to(setting.dtype)
        meta.store(name, quantize(dense.t() if is_transposed(parent) else dense, **options[name]), "")
    for name, tensor in meta.shapes.items():
        if name not in options and meta.dtype_of(name) != tensor.dtype:
            parent, _, leaf = name.rpartition(".")
            wide = nn.Parameter(tensor.to(torch.float32), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, wide)
    model.tie_weights(missing_keys=set(meta.tied), recompute_mapping=False)
    model.load_report = make_report(model, path)
    add_lora(model, setting.lora)
    return model.train()


def _stored_options(step: FourBit, meta: MetaModel, setting: Setting) -> dict[str, Any]:
    """Of a weight that is 4-bit in the files."""
    parts = {part.name.removeprefix(step.key): part for part in step.parts}
    scales = parts.get(".absmax")
    if scales is None or not scales.shape:
        raise UserError(f"{step.file}: {step.key} has no scales: expected {step.key}.absmax.")
    blocks = math.prod(scales.shape)
    per_block = meta.shapes[step.name].numel() / blocks if blocks else setting.block_size
    stored = {"block_size": 1 << max(0, math.ceil(math.log2(per_block))), "double_quant": ".nested_absmax" in parts}
    return {**setting.quant_options, **stored}


def _largest_read(source: SafetensorsSource, meta: MetaModel, options: Options) -> int:
    """Bytes of the largest stored tensor that goes through memory of its own on its way into the model."""
    largest = 0
    for step in source.plan(meta).steps:
        if isinstance(step, Plain) and (step.name in options or step.stored.dtype != meta.dtype_of(step.name)):
            largest = max(largest, step.stored.num_bytes)
        elif not isinstance(step, (Plain, FourBit)):
            largest = max(largest, *(stored.num_bytes for stored in step.parts))
    return largest
