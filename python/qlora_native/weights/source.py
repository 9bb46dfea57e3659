"""What a model is loaded from: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from qlora_native._io import check_folder, read_json, reading
from qlora_native.errors import UserError
from qlora_native.weights.config import four_bit_config, read_config
from qlora_native.weights.files import Scratch, StoredTensor, first_sentence, stored_tensors
from qlora_native.weights.float8 import FLOATS, unscaled
from qlora_native.weights.match import STATE_MARK, Match, check_match, match_tensors
from qlora_native.weights.shapes import ModelShapes

# For a quant_type: the bytes of a GGUF file as they are; and "keep" for such a file, "nf4" for all else.
KEEP, AUTO = "keep", "auto"


class Source:
    """What a model is loaded from."""

    path: Path
    files: list[Path]  # that make the model
    config: PreTrainedConfig
    four_bit_config: dict[str, object] | None = None  # the files' own description of weights that are 4-bit already
    is_four_bit = False
    is_whole = False  # the whole 16-bit model is made on reading

    def match(self, meta: ModelShapes) -> Match:
        """Which stored tensors become which of the model."""
        raise NotImplementedError

    def match_kept(self, meta: ModelShapes, skip_modules: Iterable[str], is_mapped: bool) -> Match:
        """The match in which weights keep their bytes, but for those of ``skip_modules``; see :meth:`keeps`. Unless
        ``is_mapped`` they are copied into memory."""
        raise NotImplementedError

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, in 16 or 32 bits; through the scratch it is valid until the next reading."""
        raise NotImplementedError

    def read_part(self, stored: StoredTensor, begin: int, end: int) -> Tensor:
        """Elements ``begin`` to ``end`` of the flattened tensor, in the stored dtype."""
        return stored.read_part(begin, end)

    def keeps(self, quant_type: str) -> bool:
        """Whether ``quant_type``, of :func:`qlora_native.load_model`, keeps the bytes of a GGUF file."""
        if quant_type == KEEP and not self.is_four_bit:
            raise UserError(f"{self.path} holds 16-bit weights: quant_type {KEEP!r} keeps those of a GGUF file.")
        return False


class SafetensorsSource(Source):
    """A folder with ``config.json`` and safetensors, 16-bit or 32-bit, or 4-bit in bitsandbytes' format."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        check_folder(folder)
        self.tensors = stored_tensors(folder)
        self.config = read_config(folder)
        self.four_bit_config = four_bit_config(self.config, folder)
        self.is_four_bit = any(STATE_MARK in key for key in self.tensors)
        self.files = [folder / "config.json", *sorted({stored.file for stored in self.tensors.values()})]
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
            return tensor.bfloat16() if tensor.dtype in FLOATS else tensor
        try:
            return unscaled(tensor, stored.scales.read(), torch.bfloat16)
        except ValueError as error:
            raise UserError(f"{stored.file}: {stored.name} cannot be used: {first_sentence(error)}") from error

    def generation_config(self) -> GenerationConfig | None:
        """The folder's own generation defaults, if it has any."""
        path = self.path / "generation_config.json"
        if not path.is_file():
            return None
        read_json(path)
        with reading(path):
            return GenerationConfig.from_pretrained(self.path)
