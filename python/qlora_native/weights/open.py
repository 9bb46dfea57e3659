"""What a path holds: a model's source, its tokenizer, and what a user should know of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_native._io import (
    announced,
    check_folder,
    panics_caught,
    read_json,
    reading,
    regular,
    user_path,
)
from qlora_native.data.readers import fetch_model, hub_id
from qlora_native.data.template import TEMPLATE
from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight, from_bnb
from qlora_native.weights import mxfp4
from qlora_native.weights.config import four_bit_config, read_config
from qlora_native.weights.files import (
    Scratch,
    StoredTensor,
    first_sentence,
    mapped_part,
    stored_tensors,
)
from qlora_native.weights.float8 import FLOAT8, SCALE_SUFFIX, unscaled
from qlora_native.weights.shapes import ModelShapes
from qlora_native.weights.stream import AUTO, KEEP, STATE_MARK, Entry, Match, Read, Source, check_match


def open_source(path: str | os.PathLike[str] | Source) -> Source:
    """What ``path`` holds, if it is not open already. :class:`UserError` names what is missing."""
    if isinstance(path, Source):
        return path
    path = user_path(path)
    if not path.exists() and hub_id(path):
        path = fetch_model(str(path))
    if (path / "config.json").is_file():
        return SafetensorsSource(path)
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} GGUF files: name the one to load, such as {found[0]}."
        )
    if found and found[0].suffix == ".gguf" and found[0].exists():
        try:
            from qlora_native.weights.gguf_source import GgufSource
        except ImportError as error:
            raise UserError(
                f"{found[0]} needs the package gguf: `pip install gguf` brings it."
            ) from error
        return GgufSource(regular(found[0]))
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no model: load its base model, then load_adapter(model, {str(path)!r})."
        )
    if path.is_dir():
        raise UserError(
            f"{path} has no config.json: expected a model folder as save_pretrained or `hf download` makes it."
        )
    if path.exists():
        raise UserError(
            f"{path} is a file: expected a model folder or a .gguf file; give the folder that holds it."
        )
    raise UserError(
        f"{path} is not there: expected a model folder or a .gguf file; a model of the Hugging Face hub is "
        "fetched with `hf download NAME --local-dir FOLDER`."
    )


class SafetensorsSource(Source):
    """A folder with ``config.json`` and safetensors, 16-bit or 32-bit, or 4-bit in bitsandbytes' format."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        check_folder(folder)
        self.tensors = stored_tensors(folder)
        self.config = read_config(folder)
        self.four_bit_config = four_bit_config(self.config, folder)
        self.has_four_bit_weights = any(
            STATE_MARK in key or mxfp4.owner(key, self.tensors) for key in self.tensors
        )
        self.files = [
            folder / "config.json",
            *sorted({stored.file for stored in self.tensors.values()}),
        ]
        self._match: Match | None = None

    def match(self, meta: ModelShapes) -> Match:
        """Made once for this source's config."""
        if self._match is None:
            self._match = match_tensors(self.tensors, meta)
            check_match(self._match, meta, StoredTensor.read, self.path)
        meta.model._weight_conversions = self._match.conversions  # save_pretrained reverses these
        return self._match

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, 16-bit if it is stored as 8-bit floats."""
        tensor = stored.read(scratch)
        if stored.scales is None:
            return tensor.bfloat16() if tensor.dtype in FLOAT8 else tensor
        try:
            return unscaled(tensor, stored.scales.read(), torch.bfloat16)
        except ValueError as error:
            raise UserError(
                f"{stored.file}: {stored.name} cannot be used: {first_sentence(error)}"
            ) from error

    def generation_config(self) -> GenerationConfig | None:
        """The folder's own generation defaults, if it has any."""
        path = self.path / "generation_config.json"
        if not path.is_file():
            return None
        read_json(path)
        with reading(path):
            return GenerationConfig.from_pretrained(self.path)


def match_tensors(tensors: Mapping[str, StoredTensor], meta: ModelShapes) -> Match:
    """Match every stored tensor with the model."""
    model, shapes = meta.model, meta.shapes
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    four_bit: dict[str, list[StoredTensor]] = {
        key.partition(STATE_MARK)[0]: [] for key in tensors if STATE_MARK in key
    }
    of_mxfp4 = {name for key in tensors if (name := mxfp4.owner(key, tensors))}
    four_bit |= {name: [] for name in of_mxfp4}
    scales = {
        key.removesuffix(SCALE_SUFFIX): tensors[key]
        for key in tensors.keys() - shapes.keys()
        if key.endswith(SCALE_SUFFIX) and key.removesuffix(SCALE_SUFFIX) in tensors
    }
    entries: dict[str, Entry] = {}
    unexpected: list[StoredTensor] = []
    # Some renamings remember what they have seen, and conversions stack in this order: layer 2 before layer 10.
    for key in sorted(
        tensors.keys() - {stored.name for stored in scales.values()}, key=dot_natural_key
    ):
        stored = replace(tensors[key], scales=scales.get(key))
        if key.endswith(mxfp4.CODES):
            key = mxfp4.owner(key, tensors) or key
        owner = mxfp4.owner(key, tensors) or key
        while owner and owner not in four_bit:
            owner = owner.rpartition(".")[0]
        if owner:
            four_bit[owner].append(stored)
            if key != owner:
                continue
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if name not in shapes and key in shapes:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, shapes)
        if name not in shapes:
            unexpected.append(stored)
        elif pattern is None:
            four_bit_of = mxfp4.weight_of if key in of_mxfp4 else _of_bnb
            made = (
                Entry(name, key, four_bit[key], partial(four_bit_of, key))
                if owner
                else Entry(name, key, [stored])
            )
            earlier = entries.setdefault(name, made)
            if earlier.is_plain and earlier is not made:
                raise UserError(
                    f"{stored.file}: tensors {earlier.key} and {key} are both stored for {name}."
                )
        elif owner:
            raise UserError(
                f"{stored.file}: {key} is 4-bit already, but transformers rearranges this weight of "
                f"{type(model).__name__} on loading; load the 16-bit model instead."
            )
        else:
            entry = entries.setdefault(name, Entry(name, name, [], converter=converter_of[pattern]))
            entry.parts.append(stored)
            entry.patterns.append(pattern)
    ordered = sorted(entries.values(), key=lambda entry: (entry.file, entry.parts[0].start))
    return Match(ordered, unexpected, [entry for entry in conversions if entry.was_used()])


def _of_bnb(key: str, parts: list[StoredTensor], read: Read) -> QuantizedWeight:
    tensors = {stored.name: read(stored) for stored in parts}
    return from_bnb(
        tensors,
        key,
        unread={name for name, tensor in tensors.items() if mapped_part(tensor) is not None},
    )


def notes_of(source: Source, quant_type: str = AUTO) -> list[str]:
    """What a user should read before training, a sentence each: whether the weights of a GGUF file stay as they are
    with ``quant_type``, and what llama.cpp cannot run."""
    try:
        from qlora_native.weights.gguf import ARCHITECTURES
    except ImportError:  # of the package gguf, without which nothing is exported for llama.cpp
        return []
    name, kind = source.path.name, source.config.model_type
    notes = []
    if source.path.suffix == ".gguf" and quant_type != KEEP and not source.keeps(quant_type):
        why = f"those of {kind} are not kept"
        why = "without quant.type and quant.method they stay" if source.keeps(AUTO) else why
        notes.append(
            f"{name}: its weights are converted to 4 bits anew and do not stay as they are; {why}"
        )
    if kind not in ARCHITECTURES:
        notes.append(
            f"{name}: llama.cpp's formats are not written for {kind}; what is trained can be merged into safetensors"
        )
    return notes


def load_tokenizer(model: str | os.PathLike[str] | Source, adapter: Path | None = None) -> Any:
    """The tokenizer in a model's folder or GGUF file, as transformers' ``AutoTokenizer`` makes it.

    Args:
        model: a model folder, a ``.gguf`` file, or an id of the Hugging Face hub.
        adapter: the folder of an adapter, whose tokenizer, or chat template, is taken if it has one.

    Raises:
        UserError: there is no model, or no usable tokenizer.
    """
    from transformers import AutoTokenizer

    path = model.path if isinstance(model, Source) else user_path(model)
    # A GGUF file is opened only for its error: transformers' reader takes seconds each time.
    if not isinstance(model, Source) and not (path.suffix == ".gguf" and path.is_file()):
        path = open_source(path).path
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        path = adapter
    try:
        if path.suffix == ".gguf":
            from qlora_native.weights.gguf_source import without_arrays

            what = f"Loading the tokenizer of {path.name}, which takes longer the more tokens it has"
            with announced(what), without_arrays():
                tokenizer = AutoTokenizer.from_pretrained(
                    path.parent, gguf_file=path.name, trust_remote_code=False
                )
        else:
            check_folder(path)
            with panics_caught():
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                tokenizer("a")  # raises here what settings of a wrong type would raise later
        if adapter is not None and (adapter / TEMPLATE).is_file():
            tokenizer.chat_template = (adapter / TEMPLATE).read_text(encoding="utf-8")
        return tokenizer
    except Exception as error:  # the readers raise whatever they stumble on
        open_source(path)  # UserError if the model itself is broken
        reason = first_sentence(error)[:200].rstrip(".")
        raise UserError(
            f"no usable tokenizer in {path} ({reason}); copy tokenizer.json and tokenizer_config.json of the model "
            "into it"
        ) from error
