"""A model folder into another number of bits, or another library's form of 4 bits, a few megabytes at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from qlora_native._io import is_own_file, read_json
from qlora_native._threads import sleep_while_busy
from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight, quantize, to_bnb
from qlora_native.weights.config import METADATA, METHOD, bitsandbytes_config, native_config
from qlora_native.weights.files import INDEX_NAME, WEIGHTS_NAME, Output, ShardWriter, StoredTensor
from qlora_native.weights.open import SafetensorsSource, open_source
from qlora_native.weights.shapes import MODEL_DTYPES, OUTPUT_EMBEDDING, ModelShapes, turned
from qlora_native.weights.stream import (
    STATE_MARK,
    Entry,
    Item,
    Source,
    parts_of,
    slices,
    stored_parts,
    stream,
)
from qlora_native.weights.transforms import decoding, rounding

_WEIGHT_FILES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pth",
    ".pt",
    ".gguf",
    ".h5",
)


@dataclass
class ConvertReport:
    """Numbers of files, of bytes in their tensors, and of weights that became 4-bit, became dense, or stayed 4-bit."""

    files: int = 0
    num_bytes: int = 0
    quantized: int = 0
    dequantized: int = 0
    copied: int = 0


def convert(
    source: Path,
    folder: Path,
    target: str,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
    skip_modules: tuple[str, ...] = (OUTPUT_EMBEDDING,),
    shard_bytes: int = 4 * 10**9,
) -> ConvertReport:
    """Write the model of ``source`` into ``folder``, which is there and empty.

    Tensors keep their stored names, and 4-bit weights their bytes when the target is 4-bit. Files that hold no weights
    are copied. Memory beyond the libraries: a few parts of 2^22 elements, the scales of the tensor at hand, and whole
    tensors only where one has to be transposed (GPT-2), decoded from 4 bits (its packed bytes) or made of several by
    transformers (one expert of a stack).

    Args:
        target: "16bit"; "bitsandbytes"; or "qlora", where stacks of experts are 4-bit too.
        quant_type, block_size, double_quant, skip_modules: for weights that are not 4-bit yet.
        dtype: of what is not 4-bit, and of decoded weights; None is config.json's if that is 16-bit, else bfloat16.
        shard_bytes: the largest file, unless one tensor alone is larger.
    """
    opened = open_source(source)
    if not isinstance(opened, SafetensorsSource):
        reader = (
            f"`qlora export {source} --to safetensors`"
            if target == "16bit"
            else f"`qlora quantize {source}`"
        )
        raise UserError(f"{source} is GGUF: expected a folder of safetensors; {reader} reads it.")
    dtype = dtype or (
        opened.config.dtype if opened.config.dtype in MODEL_DTYPES[:2] else torch.bfloat16
    )
    options: dict[str, Any] = {
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    quantize(torch.zeros(1), **options)  # refuses wrong options before anything is written
    made = Conversion(opened, target, dtype, options, skip_modules)
    made.write(folder, shard_bytes)
    return made.report


class Conversion:
    """A folder to be written: what the files hold, what its weights are to be, and the description of both.

    Attributes:
        entries: of the files, by name.
        four_bit: names of the weights that are 4-bit in the files.
        weights: names of those that become 4-bit.
        options: of :func:`qlora_native.quantize`, for these.
    """

    def __init__(
        self,
        source: Source,
        target: str,
        dtype: torch.dtype,
        options: dict[str, Any],
        skip_modules: tuple[str, ...],
    ) -> None:
        sleep_while_busy()
        self.source, self.target, self.dtype, self.options = source, target, dtype, options
        self.meta = ModelShapes(source.config, dtype)
        self.report = ConvertReport()
        self.match = source.match(self.meta)
        self.entries = {entry.name: entry for entry in self.match.entries}
        stored = {name: entry for name, entry in self.entries.items() if entry.four_bit is not None}
        self.four_bit = stored.keys()
        stacks = sorted(name for name in stored if not name.endswith(".weight"))
        if target == "bitsandbytes" and stacks:
            raise UserError(
                f"{source.path} holds stacks of experts in 4 bits ({stacks[0]}), which bitsandbytes does not have: "
                "convert it to 16bit first, and that to bitsandbytes."
            )
        if target != "16bit" and (source.four_bit_config or {}).get("quant_method") == "mxfp4":
            raise UserError(
                f"{source.path} holds MXFP4 weights, which are not written: expected the target 16bit."
            )
        self.weights: set[str] = set()
        if target != "16bit" and not stored:
            chosen = self.meta.four_bit_weights(skip_modules, options["block_size"])
            self.weights = {name for name in chosen if target == "qlora" or name.endswith(".weight")}
        self._storage = torch.uint8
        for entry in [*stored.values()][:1]:  # what is quantized again is quantized alike
            weight = entry.weight(source.read)
            self.options = {name: getattr(weight, name) for name in options}
            self._storage = weight.storage_dtype

    def items(self) -> Iterator[Item]:
        """The stream of the converted model."""
        to_target = (
            decoding(lambda name: self.target == "16bit"),
            rounding(self.meta, self.weights, self.options),
        )
        return stream(self.source, self.meta, to_target)

    def _items(self) -> Iterator[Item]:
        """The items that are written: of tensors that stay as they are stored, and are together only for the model, one
        for each; and one for each stored tensor that the model has no place for."""
        for item in self.items():
            if item.is_stored and item.weight is None:
                yield from (
                    replace(item, entry=replace(item.entry, parts=[stored]))
                    for stored in item.entry.parts
                )
            else:
                yield item
        for stored in self.match.unexpected if isinstance(self.source, SafetensorsSource) else ():
            yield Item(
                Entry(stored.name, stored.name, [stored]),
                stored.shape,
                lambda: iter(()),
                lambda: iter(()),
            )

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write safetensors files of at most ``shard_bytes``, unless one tensor is larger; beside them config.json, and
        whatever lies beside the source's weights (tokenizer, license)."""
        files: list[list[Item]] = [[]]
        size = 0
        for item in self._items():
            num_bytes = sum(output.num_bytes for output in self._outputs(item))
            if files[-1] and size + num_bytes > shard_bytes:
                files.append([])
                size = 0
            files[-1].append(item)
            size += num_bytes
        weight_map: dict[str, str] = {}
        for number, inside in enumerate(files, 1):
            file = (
                WEIGHTS_NAME
                if len(files) == 1
                else f"model-{number:05}-of-{len(files):05}.safetensors"
            )
            outputs = [output for item in inside for output in self._outputs(item)]
            with ShardWriter(folder / file, outputs, self.source.path) as writer:
                for item in inside:
                    self._write(item, writer)
            self.report.num_bytes += writer.num_bytes
            weight_map |= {output.name: file for output in outputs}
        self.report.files = len(files)
        four_bit = {item.name for inside in files for item in inside if item.weight is not None}
        written = {"config.json": self.config(four_bit)}
        if len(files) > 1:
            written[INDEX_NAME] = {
                "metadata": {"total_size": self.report.num_bytes},
                "weight_map": weight_map,
            }
        if isinstance(self.source, SafetensorsSource):
            for path in self.source.path.iterdir():
                if not path.name.endswith(_WEIGHT_FILES) and is_own_file(path):
                    shutil.copyfile(path, folder / path.name)
        else:
            written["generation_config.json"] = GenerationConfig.from_model_config(
                self.source.config
            ).to_diff_dict()
        for name, value in written.items():
            (folder / name).write_text(
                json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )

    def config(self, four_bit: set[str]) -> dict[str, Any]:
        """config.json: the source's, with another dtype, and with a description of the weights that are 4-bit."""
        if isinstance(self.source, SafetensorsSource):
            config = read_json(self.source.path / "config.json")
        else:
            config = {
                key: value
                for key, value in self.source.config.to_dict().items()
                if "_name_or_path" not in key
            }
        config.pop("quantization_config", None)
        config["architectures"] = config.get("architectures") or [type(self.meta.model).__name__]
        if four_bit:
            config["quantization_config"] = self._quantization_config(four_bit)
        if "vocab_size" in config:
            # With the tokens that an adapter adds.
            config["vocab_size"] = getattr(self.source.config, "vocab_size", config["vocab_size"])
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        return config | dict.fromkeys(names, str(self.dtype).removeprefix("torch."))

    def _quantization_config(self, four_bit: set[str]) -> dict[str, Any]:
        old: dict[str, Any] = self.source.four_bit_config or {}
        if old and (old.get("quant_method") == METHOD) == (self.target == "qlora"):
            return dict(old)
        compute = old.get("compute_dtype", old.get("bnb_4bit_compute_dtype"))
        modules = self.meta.model.named_modules()
        dense = [
            path
            for path, module in modules
            if type(module) is nn.Linear and f"{path}.weight" not in four_bit
        ]
        made: dict[str, Any] = {METADATA: old.get(METADATA, {}) if old else {"method": "rtn"}}
        if self.target == "qlora":
            return native_config(dense, self.options, compute, **made)
        config = bitsandbytes_config(self.dtype, self.options, dense) | made
        config["bnb_4bit_quant_storage"] = str(self._storage).removeprefix("torch.")
        config["bnb_4bit_compute_dtype"] = compute or config["bnb_4bit_compute_dtype"]
        return config

    def _outputs(self, item: Item) -> list[Output]:
        """The tensors that are written of an item."""
        key = item.entry.key
        if item.is_stored:
            return [
                Output(stored.name, self._dtype_of(item, stored), stored.shape)
                for stored in item.entry.parts
            ]
        if item.weight is None:
            shape = turned(item.shape) if item.name in self.meta.transposed else item.shape
            return [Output(key, self.meta.dtype_of(item.name), shape)]
        # Of memory that nothing is written to.
        tensors = to_bnb(
            QuantizedWeight.empty(item.shape, dtype=self.dtype, device="cpu", **self.options), key
        )
        return [
            Output(name, tensor.dtype, None if STATE_MARK in name else tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]

    def _is_raw(self, item: Item) -> bool:
        """Whether a stored item is copied as bytes, which may be any: packed codes in a dtype of floats, and what the
        model has no place for."""
        return item.weight is not None or item.name not in self.meta.shapes

    def _dtype_of(self, item: Item, stored: StoredTensor) -> torch.dtype:
        """What a tensor is stored in that is not changed: a dense one of the model in the model's dtype."""
        is_cast = stored.dtype.is_floating_point and not self._is_raw(item)
        return self.meta.dtype_of(item.name) if is_cast else stored.dtype

    def _write(self, item: Item, writer: ShardWriter) -> None:
        key = item.entry.key
        if item.is_stored:
            is_raw = self._is_raw(item)
            for stored in item.entry.parts:
                dtype = self._dtype_of(item, stored)
                for part in (stored_parts if is_raw else parts_of)(self.source, stored):
                    as_bytes = is_raw and stored.name == key
                    writer.write(stored.name, part.view(torch.uint8) if as_bytes else part.to(dtype))
            self.report.copied += item.weight is not None
        elif item.weight is not None:
            weight = item.weight(partial(writer.write, key))
            for name, tensor in to_bnb(weight, key).items():
                if name != key:
                    writer.write(name, tensor)
            self.report.quantized += 1
        else:
            parts = (part.to(self.meta.dtype_of(item.name)) for part in item.rows())
            is_turned = item.name in self.meta.transposed
            for part in slices(torch.cat([*parts]).view(item.shape).mT) if is_turned else parts:
                writer.write(key, part)
            self.report.dequantized += item.name in self.four_bit
