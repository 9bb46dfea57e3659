"""Which stored tensors become which tensors of the model: transformers' renamings and conversions, without its loader,
so that each result is read, stored in the model and dropped before the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

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
from qlora_native.hf.checkpoint import Checkpoint, Scratch, StoredTensor, first_sentence, mapped_part
from qlora_native.weight import QuantizedWeight, from_bnb

if TYPE_CHECKING:
    from qlora_native.hf.build import MetaModel

STATE_MARK = ".quant_state.bitsandbytes__"  # in the name of one tensor of every 4-bit weight in bitsandbytes' format
SCALE_SUFFIX = "_scale_inv"  # ends the name of the scales of a weight in 8-bit floats

Read = Callable[..., Tensor]  # of a StoredTensor and, if given, a Scratch
NamedTensors = Iterator[tuple[str, Tensor]]


@dataclass
class _Step:
    """Stored tensors that become one or more tensors of the model; ``name`` is that of the first of these.

    ``iter_tensors`` of a step reads its parts by ``read``, and yields (name in the model, value).
    """

    name: str
    parts: list[StoredTensor]

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.parts)

    @property
    def file(self) -> str:
        """Where the first part lies."""
        return str(self.parts[0].file)


@dataclass
class Plain(_Step):
    """One stored tensor that becomes one tensor of the model."""

    @property
    def stored(self) -> StoredTensor:
        return self.parts[0]

    @property
    def key(self) -> str:
        """Its name in the files."""
        return self.stored.name

    def iter_tensors(self, model: PreTrainedModel, read: Read, scratch: Scratch | None = None) -> NamedTensors:
        yield self.name, read(self.stored, scratch)


@dataclass
class FourBit(_Step):
    """The stored tensors of one weight that is 4-bit already; ``key`` is what their names begin with."""

    key: str

    def iter_tensors(
        self, model: PreTrainedModel, read: Read, scratch: Scratch | None = None
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        yield self.name, self.weight(read)

    def weight(self, read: Read) -> QuantizedWeight:
        """The weight of its parts; UserError if they do not fit together."""
        tensors = {stored.name: read(stored) for stored in self.parts}
        try:
            unread = {name for name, tensor in tensors.items() if mapped_part(tensor) is not None}
            return from_bnb(tensors, self.key, unread=unread)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.file}: 4-bit weight {self.key} cannot be used: {first_sentence(error)}") from error


@dataclass
class Kept(FourBit):
    """One stored tensor whose bytes the model keeps: ``make`` gives the weight over them."""

    make: Callable[[StoredTensor], QuantizedWeight]

    def weight(self, read: Read) -> QuantizedWeight:
        return self.make(self.parts[0])


@dataclass
class Converted(_Step):
    """Stored tensors that a conversion of transformers makes one or more tensors of the model from."""

    converter: WeightConverter
    patterns: list[str] = field(default_factory=list)  # that matched, one a part

    def iter_tensors(self, model: PreTrainedModel, read: Read, scratch: Scratch | None = None) -> NamedTensors:
        """All parts are read at once, and dropped as the conversion consumes them."""
        for pattern, stored in zip(self.patterns, self.parts, strict=True):
            self.converter.add_tensor(self.name, stored.name, pattern, partial(read, stored))
        try:
            results = self.converter.convert(self.name, model=model, config=model.config)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the {len(self.parts)} stored tensors around {self.parts[0].name} cannot be converted to "
                f"{self.name}: {first_sentence(error)}"
            ) from error
        for name in list(results):
            result = results.pop(name)
            yield name, result[0] if isinstance(result, list) else result

    @property
    def is_stack(self) -> bool:
        """Whether the result is a stack of matrices, each made of parts of its own, one below the other."""
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
        """The slices [1, N, K] of a stack, one after another, each valid until the next is asked for.

        The parts are read to where they belong: transformers' operations would make three copies of each.
        """
        parts_of: dict[str, list[StoredTensor]] = {}
        for pattern, stored in zip(self.patterns, self.parts, strict=True):
            parts_of.setdefault(pattern, []).append(stored)
        ordered = (parts_of[pattern] for pattern in self.converter.source_patterns if pattern in parts_of)
        slices = list(zip(*ordered, strict=True))
        widest = max(2, self.parts[0].dtype.itemsize)  # 8-bit floats become 16-bit
        scratch = Scratch(widest * max(sum(math.prod(stored.shape) for stored in parts) for parts in slices))
        for parts in slices:
            end = 0
            for stored in parts:
                behind = scratch.behind(end)
                tensor = read(stored, behind)
                place = behind.tensor(tensor.dtype, stored.shape)
                if tensor.data_ptr() != place.data_ptr():  # made of 8-bit floats
                    place.copy_(tensor)
                end += place.nbytes
            yield scratch.tensor(tensor.dtype, (1, sum(stored.shape[0] for stored in parts), tensor.shape[1]))


Step = Plain | FourBit | Converted


@dataclass
class Plan:
    """The steps in the order of the files, and the stored tensors that the model has no place for."""

    steps: list[Step]
    unexpected: list[StoredTensor]
    conversions: list[WeightRenaming | WeightConverter]


def make_plan(checkpoint: Checkpoint, meta: MetaModel) -> Plan:
    """Match every stored tensor with the model."""
    model, shapes, tensors = meta.model, meta.shapes, checkpoint.tensors
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    four_bit: dict[str, list[StoredTensor]] = {key.partition(STATE_MARK)[0]: [] for key in tensors if STATE_MARK in key}
    scales = {
        weight: tensors[key]
        for key in tensors
        if key.endswith(SCALE_SUFFIX) and key not in shapes and (weight := key.removesuffix(SCALE_SUFFIX)) in tensors
    }
    steps: dict[str, Step] = {}
    unexpected: list[StoredTensor] = []
    # Some renamings remember what they have seen, and conversions stack in this order: layer 2 before layer 10.
    for key in sorted(tensors, key=dot_natural_key):
        if key.endswith(SCALE_SUFFIX) and key.removesuffix(SCALE_SUFFIX) in scales:
            continue
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
            earlier = steps.setdefault(name, FourBit(name, four_bit[key], key) if owner else Plain(name, [stored]))
            if isinstance(earlier, Plain) and earlier.stored is not stored:
                raise UserError(f"{stored.file}: tensors {earlier.key} and {key} are both stored for {name}.")
        elif owner:
            raise UserError(
                f"{stored.file}: {key} is 4-bit already, but transformers rearranges this weight of "
                f"{type(model).__name__} on loading; load the 16-bit model instead."
            )
        else:
            step = steps.setdefault(name, Converted(name, [], deepcopy(converter_of[pattern])))
            assert isinstance(step, Converted)
            step.parts.append(stored)
            step.patterns.append(pattern)
    ordered = sorted(steps.values(), key=lambda step: (step.file, step.parts[0].start))
    return Plan(ordered, unexpected, [entry for entry in conversions if entry.was_used()])


FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_ROWS = 128  # read at a time; the fp32 products of so many rows exist at once


def unscaled(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, K] times its scales [ceil(N / n), ceil(K / k)], each block of n x k by its own, in fp32; as ``dtype``.

    The shapes give the block sizes: the power of two that makes so many blocks, or equal parts; ValueError if none do.
    """
    if weight.dim() != 2 or scales.numel() == 1:
        return (weight.float() * scales.float().reshape(())).to(dtype)
    rows, columns = (_block(weight.shape, scales.shape, dim) for dim in (0, 1))
    per_column = scales.float().repeat_interleave(columns, 1)[:, : weight.shape[1]]
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        block = torch.arange(start, min(start + _ROWS, weight.shape[0]), device=weight.device) // rows
        result[part] = weight[part].float().mul_(per_column[block])
    return result


def _block(shape: torch.Size, grid: torch.Size, dim: int) -> int:
    if len(grid) == 2:
        size, count = shape[dim], grid[dim]
        powers = [1 << bit for bit in range(size.bit_length() + 1) if -(-size // (1 << bit)) == count]
        if powers:
            return powers[-1]
        if size % count == 0:
            return size // count
    raise ValueError(f"an 8-bit weight {list(shape)} has scales {list(grid)}: expected one a block of equal size.")
