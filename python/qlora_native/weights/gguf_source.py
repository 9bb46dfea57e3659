"""A GGUF file as a model's source: its tensors decoded one at a time, or kept in the file's own bytes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_native._io import reading
from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.config import check_config
from qlora_native.weights.files import Scratch, StoredTensor, replaced, some_of
from qlora_native.weights.gguf import (
    ARCHITECTURES,
    DENSE,
    KEPT,
    ROPE_FACTORS,
    GgufFile,
    GgufTensor,
    decode,
    deinterleaved,
    interleaved,
    more_of_config,
    reordered_heads,
    rope_of,
)
from qlora_native.weights.shapes import ModelShapes, keepable_embeddings
from qlora_native.weights.stream import AUTO, KEEP, Entry, Match, Source, check_match


class GgufSource(Source):
    """One GGUF file.

    Of the architectures that are mapped here, tensors are decoded one at a time, or kept in the file's bytes; of others
    transformers' own reader makes the whole 16-bit model first.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        # Of the 16-bit model that transformers made, what was not read yet.
        self._model: dict[str, Tensor] = {}
        self._dtype: torch.dtype | None = None
        self.gguf = GgufFile(path)
        with reading(path):
            self.config = self._read_config()
        self.config.name_or_path = str(path)
        self.architecture = ARCHITECTURES.get(self.config.model_type)
        self.is_whole = self.architecture is None
        self._places: dict[str, GgufTensor] = {}  # by the name in the model

    @property
    def kinds(self) -> Counter[str]:
        """How many tensors the file has in each format, such as "q4_k"."""
        return Counter(tensor.kind for tensor in self.gguf.tensors.values())

    def keeps(self, quant_type: str) -> bool:
        """Whether ``quant_type``, of :func:`qlora_native.load_model`, keeps the file's bytes."""
        can_keep = self.architecture is not None and bool(KEPT & self.kinds.keys())
        if quant_type == KEEP and not can_keep:
            raise UserError(
                f"{self.path} is a {self.config.model_type} model in {', '.join(self.kinds)}: expected "
                f"{', '.join(ARCHITECTURES)} in {', '.join(sorted(KEPT))} to keep weights as they are; load it with "
                "quant_type 'nf4'."
            )
        return can_keep and quant_type in (AUTO, KEEP)

    def match(self, meta: ModelShapes) -> Match:
        """Each tensor decoded, in the model's names."""
        if self.architecture is None:
            if meta.dtype != self._dtype:
                self._make(meta.dtype)
            return Match([Entry(name, name, [stored]) for name, stored in self._tensors.items()], [])
        names = self.architecture.name_map(self.config.num_hidden_layers)
        found = {
            name: self.gguf.tensors.get(names.get_name(name, (".weight", ".bias")) or "")
            for name in meta.shapes
        }
        self._places = {name: tensor for name, tensor in found.items() if tensor is not None}
        used = {tensor.name for tensor in self._places.values()} | {ROPE_FACTORS}
        others = [
            self._stored(name, tensor)
            for name, tensor in self.gguf.tensors.items()
            if name not in used
        ]
        entries = [
            Entry(name, name, [self._stored(name, tensor)]) for name, tensor in self._places.items()
        ]
        match = Match(sorted(entries, key=lambda entry: entry.parts[0].start), others)
        check_match(match, meta, self.read, self.path)
        return match

    def _stored(self, name: str, tensor: GgufTensor) -> StoredTensor:
        dtype = DENSE.get(tensor.kind, torch.float32)
        return StoredTensor(name, self.path, dtype, tensor.shape, tensor.start, tensor.num_bytes)

    def match_kept(self, meta: ModelShapes, skip_modules: Iterable[str], is_mapped: bool) -> Match:
        """The match in which weights keep their bytes where the model's module allows it, in the file or in memory."""
        match = self.match(meta)
        matrices = meta.four_bit_weights(skip_modules, 64).keys()
        linear = matrices | keepable_embeddings(meta, skip_modules)
        kinds = {name: tensor.kind for name, tensor in self._places.items()}
        for entry in match.entries:
            if entry.name in linear and kinds[entry.name] in KEPT:
                entry.four_bit = lambda parts, read: self.quantized(parts[0], meta.dtype, is_mapped)
        others = Counter(
            kind for name, kind in kinds.items() if name in linear and kind not in KEPT | DENSE.keys()
        )
        if others:
            warnings.warn(
                f"{self.path}: {sum(others.values())} weights are in {', '.join(others)}, which no kernel reads: "
                "linear layers become NF4, embeddings 16-bit.",
                stacklevel=3,
            )
        match.rounded = {name for name in matrices if kinds.get(name) in others}
        return match

    def quantized(self, stored: StoredTensor, dtype: torch.dtype, is_mapped: bool) -> QuantizedWeight:
        """A weight over the file's own bytes; of q and k a copy of them, if their rows have another order there."""
        tensor = self._places[stored.name]
        rows = self._rows(stored.name)
        packed = (rows if is_mapped else rows.clone()).reshape(-1)
        return QuantizedWeight.of_blocks(
            packed, shape=tensor.shape, dtype=dtype, quant_type=tensor.kind
        )

    def _rows(self, name: str) -> Tensor:
        """The bytes of a tensor, a row of it each, in the model's order."""
        assert self.architecture is not None
        rows = self.gguf.bytes_of(self._places[name])
        path, _, leaf = name.rpartition(".")
        heads = reordered_heads(self.config, self.architecture, path)
        if heads is None:
            return rows
        if leaf == "bias":
            return deinterleaved(rows.view(-1, 4), heads).view(1, -1)
        return deinterleaved(rows, heads)

    def kind_of(self, stored: StoredTensor) -> str:
        """The format of a tensor of the match, such as "q4_k"."""
        return self._places[stored.name].kind

    def write_copy(self, path: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the file once more, with these bytes of some linear weights, rows in the model's order."""
        assert self.architecture is not None
        names = self.architecture.name_map(self.config.num_hidden_layers)
        shutil.copyfile(self.path, path)
        with path.open("r+b") as file:
            for name, packed in weights:
                tensor = self.gguf.tensors[names.get_name(name, (".weight",)) or name]
                heads = reordered_heads(self.config, self.architecture, name.removesuffix(".weight"))
                rows = packed.view(tensor.shape[0], -1)
                file.seek(tensor.start)
                file.write(
                    (rows if heads is None else interleaved(rows, heads)).contiguous().numpy().data
                )

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """The tensor, decoded; of what transformers made no longer kept here, and made again when asked for again."""
        if self.architecture is not None:
            return self._decoded(stored, self._rows(stored.name)).view(stored.shape)
        return self._made(stored.name).pop(stored.name)

    def read_part(self, stored: StoredTensor, begin: int, end: int) -> Tensor:
        """Elements ``begin`` to ``end`` of the flattened tensor, decoded."""
        if self.architecture is None:
            return self._made(stored.name)[stored.name].view(-1)[begin:end]
        width = stored.shape[-1]
        first = begin // width
        rows = self._rows(stored.name)[first : -(-end // width)]
        return self._decoded(stored, rows).view(-1)[begin - first * width : end - first * width]

    def _decoded(self, stored: StoredTensor, rows: Tensor) -> Tensor:
        assert self.architecture is not None
        values = decode(self._places[stored.name], rows)
        offset = self.architecture.norm_offset if stored.name.endswith("norm.weight") else 0.0
        return values - offset if offset else values

    def _made(self, name: str) -> dict[str, Tensor]:
        """What is left of the model that transformers made, with the tensor of this name."""
        if name not in self._model:
            assert self._dtype is not None
            self._make(self._dtype)
        return self._model

    def _make(self, dtype: torch.dtype) -> None:
        """Have transformers make the 16-bit model; of tensors that are tied, the first."""
        with reading(self.path), _without_bar():
            model, found = AutoModelForCausalLM.from_pretrained(
                self.path.parent,
                output_loading_info=True,
                config=deepcopy(
                    self.config
                ),  # read from the file once more otherwise, which takes seconds
                gguf_file=self.path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
            )
            if absent := found["missing_keys"]:  # which transformers would fill with random numbers
                raise ValueError(f"it lacks tensors of its model: {some_of(sorted(absent))}")
        self._dtype = dtype
        once: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in model.state_dict().items():
            once.setdefault(tensor.data_ptr(), (name, tensor.detach()))
        self._model = dict(once.values())
        self._tensors = {
            name: StoredTensor(name, self.path, value.dtype, tuple(value.shape), 0, value.nbytes)
            for name, value in self._model.items()
        }

    def _read_config(self) -> PreTrainedConfig:
        """transformers' reading of the metadata, with what it leaves out of them."""
        with tempfile.TemporaryDirectory() as folder:
            self.gguf.write_skeleton(Path(folder, "skeleton.gguf"))
            values, _ = PreTrainedConfig.get_config_dict(folder, gguf_file="skeleton.gguf")
        check_config(self.path, values)
        kind = values["model_type"]
        if kind in ARCHITECTURES:
            values |= more_of_config(self.gguf, kind, values)
        config = CONFIG_MAPPING[kind].from_dict(values)
        layers, tensors = config.num_hidden_layers, self.gguf.tensors
        blocks = [int(found[1]) for name in tensors if (found := re.match(r"blk\.(\d+)\.", name))]
        if layers != (there := max(blocks, default=-1) + 1):
            # transformers takes minutes to find out of a few hundred layers, and drops those beyond the number
            raise ValueError(f"it is said to have {layers} layers and has tensors of {there}")
        if kind in ARCHITECTURES and ROPE_FACTORS in tensors:
            factors = decode(tensors[ROPE_FACTORS], self.gguf.bytes_of(tensors[ROPE_FACTORS]))
            config.rope_parameters = rope_of(config, factors.flatten())
        return config


def without_arrays() -> AbstractContextManager[None]:
    """Within it transformers' slow reader of GGUF gets the metadata without the arrays of the tokenizer, which
    tokenizers read by another one: AutoTokenizer asks the slow one for a config, which takes seconds."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.integrations import gguf as fast

    if not hasattr(fast, "get_gguf_tokenizer"):  # both are one
        return nullcontext()
    read = reader.load_gguf_checkpoint

    def read_skeleton(path: str, *args: Any, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            skeleton = Path(folder, "skeleton.gguf")
            GgufFile(Path(path)).write_skeleton(skeleton)
            return read(str(skeleton), *args, **options)

    return replaced(reader, "load_gguf_checkpoint", read_skeleton)


def _without_bar() -> AbstractContextManager[None]:
    """No progress bar of transformers' reader where TQDM_DISABLE forbids it, which tqdm itself reads only on import."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None or not os.environ.get("TQDM_DISABLE"):
        return nullcontext()
    return replaced(reader, "tqdm", partial(bar, disable=True))
