"""A model as training holds it, on the meta device: 4-bit weights, adapters, no memory; from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_native.data.readers import fetch_model, hub_id
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.models.build import MetaModel
from qlora_native.models.load import make_report
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.sections import QuantConfig
from qlora_native.weight import quantize
from qlora_native.weights.config import four_bit_config, read_config
from qlora_native.weights.files import INDEX_NAME, WEIGHTS_NAME
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import OUTPUT_EMBEDDING, dense_beside
from qlora_native.weights.stream import AUTO, Source, reading_shapes, stream

READER_TOKEN = 2720  # bytes of objects that the package gguf makes of a token's text, score and type


@dataclass(frozen=True)
class Setting:
    """The settings of a training run on which its memory depends; most are named as in :class:`TrainConfig`."""

    # Arguments of qn.quantize.
    quant: dict[str, Any] = field(default_factory=lambda: QuantConfig().options)
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

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding counted."""
        return self.batch_size * self.length

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
            length=config.data.max_length
            if longest is None
            else -(-longest // 8) * 8,  # as collate pads
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
    has_weights = any(
        next(folder.glob(name), None) for name in (WEIGHTS_NAME, INDEX_NAME, "*.bin", "*.pth")
    )
    return (
        read_config(folder)
        if (folder / "config.json").is_file() and not has_weights
        else open_source(folder)
    )


def meta_model(
    model: Path | Source | PreTrainedConfig, setting: Setting
) -> tuple[PreTrainedModel, int]:
    """The model as it is trained, on the meta device, and the bytes that loading it holds beside it.

    UserError as :func:`qlora_native.load_model`; ValueError if the model has no modules of the names given.
    """
    if isinstance(model, Path):
        model = opened(model)
    source = model if isinstance(model, Source) else None
    config = model.config if isinstance(model, Source) else model
    meta = MetaModel(config, setting.dtype, torch.device("meta"))
    lora = setting.lora
    quant = setting.quant
    skipped = [*setting.skip_modules, *lora.modules_to_save]
    if source is None and (stored := four_bit_config(config, Path(config.name_or_path))) is not None:
        double = stored.get("double_quant", stored.get("bnb_4bit_use_double_quant", False))
        quant = {**quant, "block_size": stored.get("block_size", 64), "double_quant": bool(double)}
        own: Any = stored.get("skip_modules", stored.get("llm_int8_skip_modules"))
        skipped = [*(own or ()), *lora.modules_to_save]
    is_kept = source is not None and source.keeps(quant["quant_type"])
    if is_kept or quant["quant_type"] == AUTO:
        quant = {**quant, "quant_type": "nf4"}
    entries = None
    options: dict[str, dict[str, Any]] = {}  # arguments of quantize for each 4-bit weight, by its name
    if source is not None and is_kept:
        beside = dense_beside(lora.modules_to_save, lora.trainable_tokens, is_kept)
        match = source.match_kept(meta, beside, is_mapped=True)
        entries = match.entries
        options = dict.fromkeys(match.rounded, quant)
    elif source is None or not source.has_four_bit_weights:
        options = dict.fromkeys(meta.four_bit_weights(skipped, quant["block_size"]), quant)
    if source is None:
        read = max((2 * meta.shapes[name].numel() for name in options), default=0)
    elif source.is_whole:
        # The peak of transformers' reader of GGUF, where nothing is 4-bit: the tokenizer's arrays, and either the
        # largest tensor (decoded rows, these end to end, and a copy, all in fp32, and in `dtype`), or all in `dtype`
        # with the memory of those rows, which the heap keeps.
        sizes = [tensor.numel() for name, tensor in meta.shapes.items() if name not in meta.tied]
        size = setting.dtype.itemsize
        decoded = max((12 + size) * max(sizes), size * sum(sizes) + 4 * max(sizes))
        read = READER_TOKEN * config.get_text_config().vocab_size + decoded
    else:
        read = 0  # of the largest stored tensor that goes through memory of its own
        for item in stream(source, meta, entries=entries):
            entry = item.entry
            is_lasting = entry.is_plain and item.name not in options
            if item.weight is None and not (
                is_lasting and entry.parts[0].dtype == meta.dtype_of(item.name)
            ):
                read = max(read, *(part.num_bytes for part in entry.parts))
            elif is_kept and item.weight is not None:
                meta.store(item.name, item.weight().to("meta"), entry.file)
            elif item.weight is not None:
                meta.store(item.name, entry.weight(reading_shapes(source.read)), entry.file)
    trained = _trained(meta, options, setting, Path() if source is None else source.path)
    if source is not None and source.is_whole:
        read = max(0, read - trained.load_report.num_bytes)
    return trained, read


def _trained(meta: MetaModel, options: dict[str, dict[str, Any]], setting: Setting, path: Path) -> Any:
    """The model as loading leaves it, with its ``load_report``, and with adapters."""
    for name, chosen in options.items():
        dense = meta.shapes[name].to(setting.dtype)
        meta.store(name, quantize(dense.mT if name in meta.transposed else dense, **chosen), "")
    for name in meta.missing - meta.tied.keys():
        meta.store(name, meta.shapes[name].to(meta.dtype_of(name)), "")
    model = meta.model
    model.tie_weights(missing_keys=set(meta.tied), recompute_mapping=False)
    model.load_report = make_report(model, path)
    add_lora(model, setting.lora)
    return model.train()
