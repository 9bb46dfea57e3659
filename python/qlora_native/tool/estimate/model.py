"""A model as training holds it, on the meta device: 4-bit weights, adapters, no memory; from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_native.data.readers import fetch_model, hub_id
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.models.build import MetaModel
from qlora_native.models.load import make_report
from qlora_native.tool.config import QuantConfig, TrainConfig
from qlora_native.weight import quantize
from qlora_native.weights.config import four_bit_config, read_config
from qlora_native.weights.files import INDEX_NAME, WEIGHTS_NAME
from qlora_native.weights.match import Entry
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import OUTPUT_EMBEDDING, dense_beside, is_transposed
from qlora_native.weights.source import AUTO, SafetensorsSource, Source
from qlora_native.weights.stream import stream

READER_TOKEN = 2720  # bytes of objects that the package gguf makes of a token's text, score and type


@dataclass(frozen=True)
class Setting:
    """The settings of a training run on which its memory depends; most are named as in :class:`TrainConfig`."""

    quant: dict[str, Any] = field(default_factory=lambda: QuantConfig().options)  # arguments of qn.quantize
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
    ships: str | None = None  # the format of a 4-bit model to write at the end: nf4 or gguf
    cuda_graph: bool = True  # capture passes, where that is possible
    device: str = "cpu"  # or "cuda"

    @classmethod
    def from_config(
        cls, config: TrainConfig, device: str, rows: int | None = None, longest: int | None = None
    ) -> Setting:
        """That of a training run with so many rows, the longest of so many tokens; without them rows have
        ``data.max_length``."""
        options = config.train
        return cls(
            quant=config.quant.options,
            dtype=getattr(torch, options.dtype),
            lora=config.lora.as_config(options.seed),
            length=config.data.max_length if longest is None else -(-longest // 8) * 8,  # as collate pads
            batch_size=min(options.batch_size, rows or options.batch_size),
            micro_batches=options.grad_accum,
            checkpointing=options.grad_checkpointing,
            ships=config.lora.ship,
            cuda_graph=options.cuda_graph != "off",
            device=device,
            **{name: getattr(options, name) for name in ("optimizer", "paged", "page_budget")},
        )


def opened(model: Path) -> Source | PreTrainedConfig:
    """What a model is estimated from: its files, or its config where there is nothing else, as on the hub."""
    is_remote = not model.exists() and hub_id(model)
    folder = fetch_model(str(model), ("config.json",)) if is_remote else model
    has_weights = any(next(folder.glob(name), None) for name in (WEIGHTS_NAME, INDEX_NAME, "*.bin", "*.pth"))
    return read_config(folder) if (folder / "config.json").is_file() and not has_weights else open_source(folder)


def meta_model(model: Path | Source | PreTrainedConfig, setting: Setting) -> tuple[PreTrainedModel, int]:
    """The model as it is trained, on the meta device, and the bytes that loading it holds beside it.

    UserError as :func:`qlora_native.load_model`; ValueError if the model has no modules of the names given.
    """
    stored: dict[str, Any] | None = None  # the config's description of weights that are 4-bit already
    if isinstance(model, Path):
        model = opened(model)
    if isinstance(model, PreTrainedConfig):
        stored = four_bit_config(model, Path(model.name_or_path))
    if stored is not None:
        double = stored.get("double_quant", stored.get("bnb_4bit_use_double_quant", False))
        skip = stored.get("skip_modules", stored.get("llm_int8_skip_modules"))
        quant = {**setting.quant, "block_size": stored.get("block_size", 64), "double_quant": bool(double)}
        setting = replace(setting, quant=quant, skip_modules=tuple(skip or ()))
    config, path = (model, Path()) if isinstance(model, PreTrainedConfig) else (model.config, model.path)
    meta = MetaModel(config, setting.dtype, torch.device("meta"))
    options: Options = {}
    if isinstance(model, Source) and model.keeps(setting.quant["quant_type"]):
        skipped = dense_beside(setting.lora.modules_to_save, setting.lora.trainable_tokens, is_kept=True)
        match, read = model.match_kept(meta, skipped, is_mapped=True), [0]
        for item in stream(model, meta, entries=match.entries):
            if item.weight is None:
                read.append(item.entry.num_bytes)
            else:
                meta.store(item.name, item.weight().to("meta"), item.entry.file)
        setting = replace(setting, quant={**setting.quant, "quant_type": "nf4"})
        options = dict.fromkeys(match.rounded, setting.quant)
        return _trained(meta, options, setting, path), max(read)
    if setting.quant["quant_type"] == AUTO:
        setting = replace(setting, quant={**setting.quant, "quant_type": "nf4"})
    if isinstance(model, SafetensorsSource):
        entries = [item.entry for item in stream(model, meta) if item.weight is not None]
        options = {entry.name: _stored_options(entry, meta, setting) for entry in entries}
    if not options:
        skipped = [*setting.skip_modules, *setting.lora.modules_to_save]
        chosen = meta.four_bit_weights(skipped, setting.quant["block_size"])
        options = dict.fromkeys(chosen, setting.quant)
    if isinstance(model, Source) and not model.is_whole:
        beside = _largest_read(model, meta, options)
    elif isinstance(model, PreTrainedConfig):
        beside = max((2 * meta.shapes[name].numel() for name in options), default=0)
    else:
        beside = _read_whole(meta, setting.dtype)
        trained = _trained(meta, options, setting, path)
        return trained, max(0, beside - trained.load_report.num_bytes)
    return _trained(meta, options, setting, path), beside


def _read_whole(meta: MetaModel, dtype: torch.dtype) -> int:
    """Bytes at the peak of transformers' reader of GGUF, where nothing is 4-bit: the tokenizer's arrays, and either the
    largest tensor (decoded rows, these end to end, and a copy, all in fp32, and in ``dtype``), or all in ``dtype`` with
    the memory of those rows, which the heap keeps."""
    sizes = [tensor.numel() for name, tensor in meta.shapes.items() if name not in meta.tied]
    largest = max(sizes)
    vocabulary = meta.model.config.get_text_config().vocab_size
    read = max((12 + dtype.itemsize) * largest, dtype.itemsize * sum(sizes) + 4 * largest)
    return int(READER_TOKEN * vocabulary + read)


Options = dict[str, dict[str, Any]]  # arguments of quantize for each 4-bit weight, by its name


def _trained(meta: MetaModel, options: Options, setting: Setting, path: Path) -> PreTrainedModel:
    """The model as loading leaves it, with its ``load_report``, and with adapters."""
    model = meta.model
    for name in options:
        parent = model.get_submodule(name.rpartition(".")[0])
        dense = meta.shapes[name].to(setting.dtype)
        meta.store(name, quantize(dense.t() if is_transposed(parent) else dense, **options[name]), "")
    for name, tensor in meta.shapes.items():
        if name in meta.missing and name not in options and meta.dtype_of(name) != tensor.dtype:
            parent, _, leaf = name.rpartition(".")
            wide = nn.Parameter(tensor.to(torch.float32), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, wide)
    model.tie_weights(missing_keys=set(meta.tied), recompute_mapping=False)
    model.load_report = make_report(model, path)
    add_lora(model, setting.lora)
    return model.train()


def _stored_options(entry: Entry, meta: MetaModel, setting: Setting) -> dict[str, Any]:
    """Of a weight that is 4-bit in the files."""
    parts = {part.name.removeprefix(entry.key): part for part in entry.parts}
    scales = parts.get(".absmax")
    if scales is None or not scales.shape:
        raise UserError(f"{entry.file}: {entry.key} has no scales: expected {entry.key}.absmax.")
    blocks = math.prod(scales.shape)
    per_block = meta.shapes[entry.name].numel() / blocks if blocks else setting.quant["block_size"]
    stored = {"block_size": 1 << max(0, math.ceil(math.log2(per_block))), "double_quant": ".nested_absmax" in parts}
    return {**setting.quant, **stored}


def _largest_read(source: Source, meta: MetaModel, options: Options) -> int:
    """Bytes of the largest stored tensor that goes through memory of its own on its way into the model."""
    sizes = [0]
    for item in stream(source, meta):
        dtype = item.entry.parts[0].dtype
        is_kept = item.entry.is_plain and item.name not in options and dtype == meta.dtype_of(item.name)
        if item.weight is None and not is_kept:
            sizes += [stored.num_bytes for stored in item.entry.parts]
    return max(sizes)
