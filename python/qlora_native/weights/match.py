"""Which stored tensors become which tensors of the model: transformers' renamings and conversions, without its loader,
so that each result is read, stored in the model and dropped before the next.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight
from qlora_native.weight_tensors import from_bnb
from qlora_native.weights.files import Scratch, StoredTensor, first_sentence, mapped_part, some_of
from qlora_native.weights.float8 import FLOATS
from qlora_native.weights.shapes import DTYPES, ModelShapes

STATE_MARK = ".quant_state.bitsandbytes__"  # in the name of one tensor of every 4-bit weight in bitsandbytes' format
SCALE_SUFFIX = "_scale_inv"  # ends the name of the scales of a weight in 8-bit floats

Read = Callable[..., Tensor]  # of a StoredTensor and, if given, a Scratch
Value = Tensor | QuantizedWeight


@dataclass
class Entry:
    """Stored tensors that become one tensor of the model, or several where transformers makes these together.

    Attributes:
        name: in the model; of several the first.
        key: what the names of the stored tensors begin with.
        parts: the stored tensors.
        four_bit: makes the weight of the parts, where they are 4-bit already or stay as they are.
        converter: transformers' conversion, where there is one.
        patterns: of the conversion's names for parts, the one that each part has.
    """

    name: str
    key: str
    parts: list[StoredTensor]
    four_bit: Callable[[list[StoredTensor], Read], QuantizedWeight] | None = None
    converter: WeightConverter | None = None
    patterns: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.parts)

    @property
    def file(self) -> str:
        """Where the first part lies."""
        return str(self.parts[0].file)

    @property
    def is_plain(self) -> bool:
        """Whether it is one stored tensor that becomes one of the model."""
        return self.four_bit is None and self.converter is None

    @property
    def is_single(self) -> bool:
        """Whether it becomes one tensor of the model."""
        return self.converter is None or len(self.converter.target_patterns) == 1

    def weight(self, read: Read) -> QuantizedWeight:
        """The weight of 4-bit parts; UserError if they do not fit together."""
        assert self.four_bit is not None
        try:
            return self.four_bit(self.parts, read)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.file}: 4-bit weight {self.key} cannot be used: {first_sentence(error)}") from error

    def values(self, model: PreTrainedModel, read: Read, scratch: Scratch | None = None) -> Iterator[tuple[str, Value]]:
        """The names in the model, and the values; a plain one is read through the scratch, if there is one. Parts of a
        conversion are read all at once, and dropped as it consumes them."""
        if self.four_bit is not None:
            yield self.name, self.weight(read)
            return
        if self.converter is None:
            yield self.name, read(self.parts[0], scratch)
            return
        converter = deepcopy(self.converter)  # which keeps what it is given
        for pattern, stored in zip(self.patterns, self.parts, strict=True):
            converter.add_tensor(self.name, stored.name, pattern, partial(read, stored))
        try:
            results = converter.convert(self.name, model=model, config=model.config)
        except UserError:
            raise
        except Exception as error:
            reason = first_sentence(error)
            raise UserError(
                f"{self.file}: {self.parts[0].name} cannot be converted to {self.name}: {reason}"
            ) from error
        for name in list(results):
            result = results.pop(name)
            yield name, result[0] if isinstance(result, list) else result

    @property
    def is_stack(self) -> bool:
        """Whether the result is a stack of matrices, each made of parts of its own, one below the other."""
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        kinds = {(stored.dtype, len(stored.shape), stored.shape[1:]) for stored in self.parts}
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and len(others) <= 1
            and all(isinstance(op, Concatenate) and op.dim == 1 for op in others)
            and len(self.converter.target_patterns) == 1
            and len({*Counter(self.patterns).values()}) == 1
            and len(kinds) == 1
            and all(dims == 2 for _, dims, _ in kinds)
        )

    def slices(self, read: Callable[[StoredTensor, Scratch], Tensor]) -> Iterator[Tensor]:
        """The matrices [N, K] of a stack, one after another, each valid until the next is asked for.

        The parts are read to where they belong: transformers' operations would make three copies of each.
        """
        assert self.converter is not None
        found = [*zip(self.patterns, self.parts, strict=True)]
        ordered = ([stored for pattern, stored in found if pattern == one] for one in self.converter.source_patterns)
        slices = list(zip(*filter(None, ordered), strict=True))
        widest = max(2, self.parts[0].dtype.itemsize)  # 8-bit floats become 16-bit
        scratch = Scratch(widest * max(sum(math.prod(stored.shape) for stored in parts) for parts in slices))
        for parts in slices:
            end = 0
            for stored in parts:
                behind = scratch.behind(end)
                tensor = read(stored, behind)
                place = behind.tensor(stored.shape, tensor.dtype)
                if tensor.data_ptr() != place.data_ptr():  # made of 8-bit floats
                    place.copy_(tensor)
                end += place.nbytes
            yield scratch.tensor((sum(stored.shape[0] for stored in parts), tensor.shape[1]), tensor.dtype)


@dataclass
class Match:
    """How stored tensors match a model: entries in the order of the files, and the tensors that it has no place for.

    ``rounded`` are weights that no kernel reads as they are, where others stay so.
    """

    entries: list[Entry]
    unexpected: list[StoredTensor]
    conversions: list[WeightRenaming | WeightConverter] = field(default_factory=list)
    rounded: set[str] = field(default_factory=set)


def match_tensors(tensors: Mapping[str, StoredTensor], meta: ModelShapes) -> Match:
    """Match every stored tensor with the model."""
    model, shapes = meta.model, meta.shapes
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    four_bit: dict[str, list[StoredTensor]] = {key.partition(STATE_MARK)[0]: [] for key in tensors if STATE_MARK in key}
    scales = {
        key.removesuffix(SCALE_SUFFIX): tensors[key]
        for key in tensors.keys() - shapes.keys()
        if key.endswith(SCALE_SUFFIX) and key.removesuffix(SCALE_SUFFIX) in tensors
    }
    entries: dict[str, Entry] = {}
    unexpected: list[StoredTensor] = []
    # Some renamings remember what they have seen, and conversions stack in this order: layer 2 before layer 10.
    for key in sorted(tensors.keys() - {stored.name for stored in scales.values()}, key=dot_natural_key):
        stored = replace(tensors[key], scales=scales.get(key))
        owner = key
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
            made = Entry(name, key, four_bit[key], partial(_of_bnb, key)) if owner else Entry(name, key, [stored])
            earlier = entries.setdefault(name, made)
            if earlier.is_plain and earlier is not made:
                raise UserError(f"{stored.file}: tensors {earlier.key} and {key} are both stored for {name}.")
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
    return from_bnb(tensors, key, unread={name for name, tensor in tensors.items() if mapped_part(tensor) is not None})


def check_match(match: Match, meta: ModelShapes, read_state: Read, where: Path) -> None:
    """UserError if the match lacks tensors of the model, or has one of another shape or kind, before any is read."""

    def read(stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        if STATE_MARK in stored.name:
            return read_state(stored)
        dtype = torch.bfloat16 if stored.dtype in FLOATS else stored.dtype
        return torch.empty(stored.shape, dtype=dtype, device="meta")

    found = set()
    for entry in match.entries:
        for name, value in entry.values(meta.model, read):
            meta.check_shape(name, value, entry.file)
            is_float = meta.shapes[name].is_floating_point()
            if isinstance(value, Tensor) and (value.dtype not in (*DTYPES, torch.float64)) == is_float:
                expected = "float32, bfloat16 or float16" if is_float else "integers"
                raise UserError(f"{entry.file}: tensor {name} is {value.dtype}: expected {expected}.")
            found.add(meta.tied.get(name, name))  # of tied tensors any one is enough
    kind, model = type(meta.model).__name__, meta.model
    computed = (r"rotary_emb\.inv_freq", r"position_ids$")  # buffers that older checkpoints hold
    absent = _unmatched(
        (name for name in meta.shapes if meta.tied.get(name, name) not in found), model._keys_to_ignore_on_load_missing
    )
    unexpected = (stored.name for stored in match.unexpected)
    extra = _unmatched(unexpected, computed, model._keys_to_ignore_on_load_unexpected)
    also = f"has no place for {len(extra)} of the stored tensors ({some_of(extra)})"
    if absent:
        raise UserError(
            f"{where} lacks {len(absent)} of the {len(meta.shapes)} tensors of {kind} ({some_of(absent)})"
            f"{f', which {also}' if extra else ''}; config.json and the weights are of different models, or the copy "
            "is incomplete."
        )
    if extra:
        warnings.warn(f"{where}: {kind} {also}.", stacklevel=4)


def _unmatched(names: Iterable[str], *patterns: Iterable[str] | None) -> list[str]:
    """The names, in order, in which none of the patterns is found."""
    ignored = [pattern for group in patterns for pattern in group or ()]
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in ignored))
