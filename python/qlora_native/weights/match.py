"""Which stored tensors become which tensors of the model: transformers' renamings and conversions, without its loader,
so that each result is read, stored in the model and dropped before the next.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

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
from qlora_native.weight import QuantizedWeight, from_bnb
from qlora_native.weights.files import Checkpoint, Scratch, StoredTensor, first_sentence, mapped_part, some_of
from qlora_native.weights.float8 import FLOATS
from qlora_native.weights.shapes import DTYPES, ModelShapes

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
    rounded: set[str] = field(default_factory=set)  # weights that are to be quantized, of a plan that keeps others


def make_plan(checkpoint: Checkpoint, meta: ModelShapes) -> Plan:
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


def check_plan(plan: Plan, meta: ModelShapes, read_state: Read, where: str) -> None:
    """UserError if the plan lacks tensors of the model, or has one of another shape or kind, before any is read."""

    def read(stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        if STATE_MARK in stored.name:
            return read_state(stored)
        dtype = torch.bfloat16 if stored.dtype in FLOATS else stored.dtype
        return torch.empty(stored.shape, dtype=dtype, device="meta")

    found = set()
    for step in plan.steps:  # a converter keeps what it is given
        once = deepcopy(step) if isinstance(step, Converted) else step
        for name, value in once.iter_tensors(meta.model, read):
            meta.check_shape(name, value, step.file)
            if isinstance(value, Tensor) and not _is_like(value.dtype, meta.shapes[name].dtype):
                expected = "float32, bfloat16 or float16" if meta.shapes[name].is_floating_point() else "integers"
                raise UserError(f"{step.file}: tensor {name} is {value.dtype}: expected {expected}.")
            found.add(name)
    origins = {meta.tied.get(name, name) for name in found}  # of tied tensors any one is enough
    absent = [name for name in meta.shapes if name not in found and meta.tied.get(name, name) not in origins]
    absent = _without_ignored(absent, *(meta.model._keys_to_ignore_on_load_missing or ()))
    computed_today = (r"rotary_emb\.inv_freq", r"position_ids$")  # buffers that older checkpoints hold
    unexpected = [stored.name for stored in plan.unexpected]
    ignored = meta.model._keys_to_ignore_on_load_unexpected or ()
    extra, kind = _without_ignored(unexpected, *computed_today, *ignored), type(meta.model).__name__
    if absent:
        also = f", and has {len(extra)} that the model has no place for ({some_of(extra)})" if extra else ""
        raise UserError(
            f"{where} lacks {len(absent)} of the {len(meta.shapes)} tensors of {kind} "
            f"({some_of(absent)}){also}; config.json and the weights are of different models, or the copy is "
            "incomplete."
        )
    if extra:
        warnings.warn(
            f"{where}: {kind} has no place for {len(extra)} of the stored tensors ({some_of(extra)}).", stacklevel=4
        )


def _is_like(dtype: torch.dtype, expected: torch.dtype) -> bool:
    """Whether a stored tensor can become one of the model: integers remain integers, floats have 16 bits or more."""
    return dtype in (*DTYPES, torch.float64) if expected.is_floating_point else not dtype.is_floating_point


def _without_ignored(names: Iterable[str], *patterns: str) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns))
