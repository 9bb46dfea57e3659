"""The tensors of a model as one stream, from the files through transforms to where they go.

A source matches its stored tensors with the model: an :class:`Entry` is what becomes one tensor of it, or several that
transformers makes together, by transformers' renamings and conversions without its loader. An :class:`Item` is an entry
on its way; a transform (``transforms.py``) makes an item of an item. What comes out is stored in a model, sent to other
ranks, or written into a file, whole or a few rows at a time. Nothing is read before the end of the stream asks for it,
so the memory is that of one tensor, or of a part of it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.files import Scratch, StoredTensor, first_sentence, some_of
from qlora_native.weights.float8 import FLOAT8
from qlora_native.weights.shapes import MODEL_DTYPES, ModelShapes, turned

STATE_MARK = ".quant_state.bitsandbytes__"  # in the name of one tensor of every 4-bit weight in bitsandbytes' format
PART = 1 << 22  # elements at a time: a multiple of every block size

Read = Callable[..., Tensor]  # of a StoredTensor and, if given, a Scratch
Value = Tensor | QuantizedWeight

# For a quant_type: the bytes of a GGUF file as they are; and "keep" for such a file, "nf4" for all else.
KEEP, AUTO = "keep", "auto"


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
            raise UserError(
                f"{self.file}: 4-bit weight {self.key} cannot be used: {first_sentence(error)}"
            ) from error

    def values(
        self, model: PreTrainedModel, read: Read, scratch: Scratch | None = None
    ) -> Iterator[tuple[str, Value]]:
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
        ordered = (
            [stored for pattern, stored in found if pattern == one]
            for one in self.converter.source_patterns
        )
        slices = list(zip(*filter(None, ordered), strict=True))
        widest = max(2, self.parts[0].dtype.itemsize)  # 8-bit floats become 16-bit
        scratch = Scratch(
            widest * max(sum(math.prod(stored.shape) for stored in parts) for parts in slices)
        )
        for parts in slices:
            end = 0
            for stored in parts:
                behind = scratch.behind(end)
                tensor = read(stored, behind)
                place = behind.tensor(stored.shape, tensor.dtype)
                if tensor.data_ptr() != place.data_ptr():  # made of 8-bit floats
                    place.copy_(tensor)
                end += place.nbytes
            yield scratch.tensor(
                (sum(stored.shape[0] for stored in parts), tensor.shape[1]), tensor.dtype
            )


@dataclass
class Match:
    """How stored tensors match a model: entries in the order of the files, and the tensors that it has no place for.

    ``rounded`` are weights that no kernel reads as they are, where others stay so.
    """

    entries: list[Entry]
    unexpected: list[StoredTensor]
    conversions: list[WeightRenaming | WeightConverter] = field(default_factory=list)
    rounded: set[str] = field(default_factory=set)


class Source:
    """What a model is loaded from."""

    path: Path
    files: list[Path]  # that make the model
    config: PreTrainedConfig
    # The files' own description of weights that are 4-bit already.
    four_bit_config: dict[str, object] | None = None
    has_four_bit_weights = False  # by bitsandbytes or MXFP4; of a GGUF file see :meth:`keeps`
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
        if quant_type == KEEP and not self.has_four_bit_weights:
            raise UserError(
                f"{self.path} holds 16-bit weights: quant_type {KEEP!r} keeps those of a GGUF file."
            )
        return False


@dataclass(frozen=True)
class Item:
    """What one entry of the files becomes.

    Attributes:
        entry: the stored tensors, and their name in the model.
        shape: of the matrix as a product sees it, [out, in]; stacks have a dimension more.
        values: the tensors of the model by name, each whole.
        rows: the matrix from top to bottom, [n, in] at a time; not of one that is 4-bit.
        weight: of one that is 4-bit: the weight. Given a function, it hands the codes to it part by part, and returns
            the weight without codes.
        is_stored: whether it is as it lies in the files.
    """

    entry: Entry
    shape: tuple[int, ...]
    values: Callable[[], Iterator[tuple[str, Value]]]
    rows: Callable[[], Iterator[Tensor]]
    weight: Callable[..., QuantizedWeight] | None = None
    is_stored: bool = True

    @property
    def name(self) -> str:
        """In the model."""
        return self.entry.name


Transform = Callable[[Item], Item]


def stream(
    source: Source,
    meta: ModelShapes,
    transforms: Sequence[Transform] = (),
    *,
    prefix: str = "",
    entries: Iterable[Entry] | None = None,
    read: Read | None = None,
    is_lasting: Callable[[Entry], bool] = lambda entry: False,
) -> Iterator[Item]:
    """The tensors of a model, in the order of the files.

    Args:
        source, meta: the files, and the model that they are of.
        transforms: what is done to each item, in this order.
        prefix: what the names in the model begin with, as those of one layer do.
        entries: in place of the source's.
        read: in place of the source's.
        is_lasting: whether ``values`` of a plain entry has a tensor in memory of its own, which stays valid; the others
            are read through the same memory, one after another.
    """
    entries = source.match(meta).entries if entries is None else entries
    entries = [entry for entry in entries if entry.name.startswith(prefix)]
    read = read or source.read
    sizes = (entry.num_bytes for entry in entries if entry.is_plain and not is_lasting(entry))
    scratch = Scratch(max(sizes, default=0))
    for entry in entries:
        is_turned = entry.name in meta.transposed
        shape = tuple(meta.shapes[entry.name].shape)
        item = Item(
            entry,
            turned(shape) if is_turned else shape,
            partial(entry.values, meta.model, read, None if is_lasting(entry) else scratch),
            partial(_rows, source, meta, entry, is_turned),
            None if entry.four_bit is None else partial(entry.weight, read),
        )
        for transform in transforms:
            item = transform(item)
        yield item


def _rows(source: Source, meta: ModelShapes, entry: Entry, is_turned: bool) -> Iterator[Tensor]:
    if entry.is_plain:
        parts = parts_of(source, entry.parts[0], is_turned)
    elif entry.is_stack:
        parts = (part for one in entry.slices(source.read) for part in slices(one))
    else:
        parts = (part for _, value in entry.values(meta.model, source.read) for part in slices(value))  # type: ignore[arg-type]
    width = meta.shapes[entry.name].shape[-2 if is_turned else -1]
    return (part.view(-1, width) for part in parts)


def parts_of(source: Source, stored: StoredTensor, is_turned: bool = False) -> Iterator[Tensor]:
    """The elements of a stored tensor, or of its transpose, whole rows at a time; 8-bit floats as 16-bit."""
    if stored.scales is not None or stored.dtype in FLOAT8 or is_turned:
        tensor = source.read(stored)
        yield from slices(tensor.mT if is_turned else tensor)
        return
    yield from stored_parts(source, stored)


def stored_parts(source: Source, stored: StoredTensor) -> Iterator[Tensor]:
    """The elements of a stored tensor as they are, whole rows at a time."""
    numel, size = math.prod(stored.shape), part_size(stored.shape)
    for begin in range(0, numel, size):
        yield source.read_part(stored, begin, min(begin + size, numel))


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor in row-major order, contiguous, in parts of :func:`part_size`."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(part_size(tensor.shape))
        return
    for part in tensor.split(max(1, part_size(tensor.shape) // tensor[0].numel())):
        yield part.contiguous().view(-1)


def part_size(shape: tuple[int, ...]) -> int:
    """About PART elements: rows of a tensor that are whole blocks of any size."""
    width = max(1, shape[-1]) if shape else 1
    step = width * (4096 // math.gcd(width, 4096))
    return step * max(1, PART // step)


def reading_shapes(read_state: Read) -> Read:
    """A function that reads tensors onto the meta device, but for the descriptions of bitsandbytes' weights."""

    def read(stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        if STATE_MARK in stored.name:
            return read_state(stored)
        dtype = torch.bfloat16 if stored.dtype in FLOAT8 else stored.dtype
        return torch.empty(stored.shape, dtype=dtype, device="meta")

    return read


def check_match(match: Match, meta: ModelShapes, read_state: Read, where: Path) -> None:
    """UserError if the match lacks tensors of the model, or has one of another shape or kind, before any is read."""
    found, read = set(), reading_shapes(read_state)
    for entry in match.entries:
        for name, value in entry.values(meta.model, read):
            meta.check_shape(name, value, entry.file)
            is_float = meta.shapes[name].is_floating_point()
            if (
                isinstance(value, Tensor)
                and (value.dtype not in (*MODEL_DTYPES, torch.float64)) == is_float
            ):
                expected = "float32, bfloat16 or float16" if is_float else "integers"
                raise UserError(f"{entry.file}: tensor {name} is {value.dtype}: expected {expected}.")
            found.add(meta.tied.get(name, name))  # of tied tensors any one is enough
    kind, model = type(meta.model).__name__, meta.model
    computed = (r"rotary_emb\.inv_freq", r"position_ids$")  # buffers that older checkpoints hold
    absent = _unmatched(
        (name for name in meta.shapes if meta.tied.get(name, name) not in found),
        model._keys_to_ignore_on_load_missing,
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
