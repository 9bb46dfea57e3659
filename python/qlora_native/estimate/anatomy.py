"""A model as training would hold it, on the meta device: 4-bit layers, adapters, no memory; from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_native.errors import UserError
from qlora_native.hf.build import OUTPUT_EMBEDDING, MetaModel, is_transposed, put_four_bit
from qlora_native.hf.checkpoint import INDEX_NAME, WEIGHTS_NAME
from qlora_native.hf.load import LoadReport, make_report
from qlora_native.hf.plan import FourBit, Plain
from qlora_native.hf.source import GgufSource, SafetensorsSource, four_bit_config, open_source, read_config
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.reference import NESTED_BLOCK
from qlora_native.weight import QuantizedWeight

if TYPE_CHECKING:
    from qlora_native.config import TrainConfig


@dataclass(frozen=True)
class Setting:
    """What a training run does, as far as its memory depends on it.

    Attributes:
        quant_type, block_size, double_quant, skip_modules: as :func:`qlora_native.load_model`.
        dtype: of activations and of what is not 4-bit.
        lora: the adapter.
        batch_size, length: rows of a micro-batch, and tokens of the longest.
        micro_batches: of a step.
        optimizer: "adamw", "adamw8bit" or "lion".
        paged, page_budget: as :class:`qlora_native.optim.AdamW`.
        checkpointing: whether activations are computed again in the backward pass.
        device: "cpu" or "cuda".
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,)
    dtype: torch.dtype = torch.bfloat16
    lora: LoraConfig = field(default_factory=LoraConfig)
    batch_size: int = 4
    length: int = 1024
    micro_batches: int = 4
    optimizer: str = "adamw"
    paged: str | bool = "auto"
    page_budget: int | None = None
    checkpointing: bool = True
    device: str = "cpu"

    @classmethod
    def from_config(cls, config: TrainConfig, device: str) -> Setting:
        """That of a training run with rows of ``data.max_length`` tokens."""
        options = config.train
        return cls(
            quant_type=config.quant.type,
            block_size=config.quant.block_size,
            double_quant=config.quant.double_quant,
            dtype=getattr(torch, options.dtype),
            lora=LoraConfig(**config.lora.model_dump(), seed=options.seed),
            batch_size=options.batch_size,
            length=config.data.max_length,
            micro_batches=options.grad_accum,
            optimizer=options.optimizer,
            paged=options.paged,
            page_budget=options.page_budget,
            checkpointing=options.grad_checkpointing,
            device=device,
        )


@dataclass(frozen=True)
class Anatomy:
    """A model without memory.

    Attributes:
        model: on the meta device, with adapters.
        report: what is 4-bit and what is not, without the adapters.
        largest_read: bytes of the largest tensor that loading holds beside the model.
        whole_read: bytes of a 16-bit model that loading makes first, for GGUF; 0 for safetensors.
        has_weights: False if there was a config.json alone.
    """

    model: PreTrainedModel
    report: LoadReport
    largest_read: int
    whole_read: int
    has_weights: bool


def read_anatomy(path: Path, setting: Setting) -> Anatomy:
    """The model of a folder (config.json, with or without weights) or a GGUF file. UserError as
    :func:`qlora_native.load_model`; ValueError for names of modules that the model has not."""
    if (path / "config.json").is_file() and not _has_weights(path):
        config = read_config(path)
        return of_config(config, setting, path, four_bit_config(config, path))
    source = open_source(path)
    tree = MetaModel(source.config, setting.dtype, torch.device("meta"))
    if isinstance(source, GgufSource):
        shapes = tree.shapes.values()
        whole = sum(shape.numel() for shape in shapes) * setting.dtype.itemsize
        return _adapted(_frozen(tree, _chosen(tree, setting), setting, {}), path, setting, 0, whole, True)
    weights, stored = {}, {}
    for step in source.plan(tree).steps:
        if isinstance(step, FourBit):
            weights[step.name], stored[step.name] = _stored_four_bit(step, tree, setting)
    if not weights:
        weights = _chosen(tree, setting)
    largest = _largest_read(source, tree, weights)
    return _adapted(_frozen(tree, weights, setting, stored), path, setting, largest, 0, True)


def of_config(
    config: PreTrainedConfig, setting: Setting, path: Path = Path(), four_bit: dict[str, Any] | None = None
) -> Anatomy:
    """The model that a config describes; ``four_bit`` is its description of weights that are 4-bit already."""
    if four_bit is not None:
        double = four_bit.get("double_quant", four_bit.get("bnb_4bit_use_double_quant", False))
        block = four_bit.get("block_size", 64)
        skip = four_bit.get("skip_modules", four_bit.get("llm_int8_skip_modules"))
        setting = replace(setting, double_quant=bool(double), block_size=block, skip_modules=tuple(skip or ()))
    tree = MetaModel(config, setting.dtype, torch.device("meta"))
    weights = _chosen(tree, setting)
    sizes = [tensor.numel() * (2 if name in weights else 0) for name, tensor in tree.shapes.items()]
    return _adapted(_frozen(tree, weights, setting, {}), path, setting, max(sizes, default=0), 0, False)


def _has_weights(folder: Path) -> bool:
    known = (WEIGHTS_NAME, INDEX_NAME)
    return any((folder / name).is_file() for name in known) or any(
        next(folder.glob(pattern), None) is not None for pattern in ("*.bin", "*.pth")
    )


def _chosen(tree: MetaModel, setting: Setting) -> dict[str, bool]:
    return tree.four_bit_weights(setting.skip_modules, setting.block_size)


def _frozen(
    tree: MetaModel, weights: dict[str, bool], setting: Setting, stored: dict[str, QuantizedWeight]
) -> PreTrainedModel:
    """The model as loading leaves it."""
    model = tree.model
    for name, transposed in weights.items():
        shape = tuple(tree.shapes[name].shape)
        weight = stored.get(name) or _meta_weight(shape[::-1] if transposed else shape, setting)
        put_four_bit(model, name, weight)
    for name, tensor in tree.shapes.items():
        if name not in weights and tree.dtype_of(name) != tensor.dtype:
            path, _, leaf = name.rpartition(".")
            wide = nn.Parameter(tensor.to(torch.float32), requires_grad=False)
            setattr(model.get_submodule(path), leaf, wide)
    model.tie_weights(missing_keys=set(tree.tied), recompute_mapping=False)
    return model


def _adapted(
    model: PreTrainedModel, path: Path, setting: Setting, largest: int, whole: int, has_weights: bool
) -> Anatomy:
    report = make_report(model, path)
    add_lora(model, setting.lora)
    return Anatomy(model.train(), report, largest, whole, has_weights)


def _meta_weight(shape: tuple[int, ...], setting: Setting) -> QuantizedWeight:
    """A quantized weight of the meta device."""
    numel, double_quant = math.prod(shape), setting.double_quant
    blocks = -(-numel // setting.block_size)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    return QuantizedWeight(
        empty((numel + 1) // 2, dtype=torch.uint8),
        empty(blocks, dtype=torch.uint8) if double_quant else empty(blocks),
        shape=shape,
        dtype=setting.dtype,
        quant_type=setting.quant_type,
        block_size=setting.block_size,
        nested_absmax=empty(-(-blocks // NESTED_BLOCK)) if double_quant else None,
        nested_offset=torch.empty((), device="meta") if double_quant else None,
    )


def _stored_four_bit(step: FourBit, tree: MetaModel, setting: Setting) -> tuple[bool, QuantizedWeight]:
    """Whether the model stores a weight transposed that is 4-bit in the files, and its meta twin."""
    transposed = is_transposed(tree.model.get_submodule(step.name.rpartition(".")[0]))
    shape = tuple(tree.shapes[step.name].shape)
    parts = {part.name.removeprefix(step.key): part for part in step.parts}
    numel, scales = math.prod(shape), parts.get(".absmax")
    if scales is None or not scales.shape:
        raise UserError(f"{step.file}: {step.key} has no scales: expected {step.key}.absmax.")
    blocks = math.prod(scales.shape)
    block_size = 1 << max(0, math.ceil(math.log2(numel / blocks))) if blocks else setting.block_size
    as_stored = replace(setting, block_size=block_size, double_quant=".nested_absmax" in parts)
    return transposed, _meta_weight(shape[::-1] if transposed else shape, as_stored)


def _largest_read(source: SafetensorsSource, tree: MetaModel, weights: dict[str, bool]) -> int:
    """Bytes of the largest stored tensor that goes through memory of its own on its way into the model."""
    largest = 0
    for step in source.plan(tree).steps:
        if isinstance(step, Plain) and (step.name in weights or step.stored.dtype != tree.dtype_of(step.name)):
            largest = max(largest, step.stored.num_bytes)
        elif not isinstance(step, (Plain, FourBit)):
            largest = max(largest, *(stored.num_bytes for stored in step.parts))
    return largest
