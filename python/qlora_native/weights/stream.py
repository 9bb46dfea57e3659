"""The tensors of a model as one stream, from the files through transforms to where they go.

A transform makes an item of an item: it quantizes, decodes, or adds an adapter. What comes out is stored in a model,
sent to other ranks, or written into a file, whole or a few rows at a time. Nothing is read before the end of the stream
asks for it, so the memory is that of one tensor, or of a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_native._pages import interleave
from qlora_native.errors import UserError
from qlora_native.lora.adapter import StoredAdapter
from qlora_native.ops.quantize_4bit import double_quantize
from qlora_native.reference import non_finite_message
from qlora_native.weight import QuantizedWeight, quantize
from qlora_native.weights.files import Scratch, StoredTensor, first_sentence
from qlora_native.weights.float8 import FLOATS
from qlora_native.weights.match import Entry, Read, Value
from qlora_native.weights.shapes import ModelShapes
from qlora_native.weights.source import Source

PART = 1 << 22  # elements at a time: a multiple of every block size


@dataclass(frozen=True)
class Item:
    """What one entry of the files becomes.

    Attributes:
        entry: the stored tensors, and their name in the model.
        shape: of the matrix as a product sees it, [out, in]; stacks have a dimension more.
        values: the tensors of the model by name, each whole.
        rows: the matrix from top to bottom, [n, in] at a time; not of one that is 4-bit.
        weight: of one that is 4-bit: the weight; with a function, which takes the codes part by part, without these.
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
Write = Callable[[Tensor], object] | None


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
        turned = entry.name in meta.transposed
        shape = tuple(meta.shapes[entry.name].shape)
        item = Item(
            entry,
            shape[::-1] if turned else shape,
            partial(entry.values, meta.model, read, None if is_lasting(entry) else scratch),
            partial(_rows, source, meta, entry, turned),
            None if entry.four_bit is None else partial(entry.weight, read),
        )
        for transform in transforms:
            item = transform(item)
        yield item


def _rows(source: Source, meta: ModelShapes, entry: Entry, turned: bool) -> Iterator[Tensor]:
    if entry.is_plain:
        parts = parts_of(source, entry.parts[0], turned)
    elif entry.is_stack:
        parts = (part for one in entry.slices(source.read) for part in slices(one))
    else:
        parts = (part for _, value in entry.values(meta.model, source.read) for part in slices(value))  # type: ignore[arg-type]
    width = meta.shapes[entry.name].shape[0 if turned else -1]
    return (part.view(-1, width) for part in parts)


def parts_of(source: Source, stored: StoredTensor, turned: bool = False) -> Iterator[Tensor]:
    """The elements of a stored tensor, or of its transpose, whole rows at a time; 8-bit floats as 16-bit."""
    if stored.scales is not None or stored.dtype in FLOATS or turned:
        tensor = source.read(stored)
        yield from slices(tensor.t() if turned else tensor)
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


def rounding(
    meta: ModelShapes,
    names: Container[str],
    options: Mapping[str, Any],
    function: Callable[..., QuantizedWeight] = quantize,
    device: torch.device | str = "cpu",
) -> Transform:
    """Quantize the dense weights of these ``names``: the bytes of each quantized whole, made part by part.

    Args:
        options: of :func:`qlora_native.quantize`.
        function: in its place.
        device: where ``values`` has them.
    """
    plain = {**options, "double_quant": False}

    def made(entry: Entry, parts: Iterator[Tensor], shape: tuple[int, ...], write: Write = None) -> QuantizedWeight:
        def quantized() -> Iterator[QuantizedWeight]:
            done = 0
            for part in parts:
                try:
                    yield function(part.to(device), **plain)
                except ValueError as error:
                    bad = (~part.isfinite()).flatten().nonzero()
                    sentence = non_finite_message(int(bad[0]), part, done, shape) if len(bad) else first_sentence(error)
                    reason = sentence.partition(": ")[2]
                    raise UserError(f"{entry.file}: weight {entry.name} cannot be quantized: {reason}") from error
                done += part.numel()

        return join(quantized(), shape, meta.dtype, options, device, write)

    def weight(item: Item, write: Write = None) -> QuantizedWeight:
        return made(item.entry, item.rows(), item.shape, write)

    def values(item: Item) -> Iterator[tuple[str, Value]]:
        is_stack = item.entry.is_stack and item.name in names
        for name, value in [(item.name, weight(item))] if is_stack else item.values():
            if name in names and isinstance(value, Tensor):
                value = value.t() if name in meta.transposed else value
                rows = (part.view(-1, value.shape[-1]) for part in slices(value))
                value = made(item.entry, rows, tuple(value.shape))
            if isinstance(value, QuantizedWeight):
                interleave(value.packed)
            yield name, value

    def transform(item: Item) -> Item:
        if item.weight is not None:
            return item
        if item.name in names and item.entry.is_single:
            return replace(item, values=partial(values, item), weight=partial(weight, item), is_stored=False)
        return item if item.entry.is_single else replace(item, values=partial(values, item))

    return transform


def decoding(is_chosen: Callable[[str], bool]) -> Transform:
    """Make the 4-bit weights of the chosen names fp32."""

    def rows(item: Item) -> Iterator[Tensor]:
        assert item.weight is not None
        flat, size = item.weight().flatten(), part_size(item.shape)
        for begin in range(0, flat.numel(), size):
            part = flat.slice(begin, min(begin + size, flat.numel())).dequantize(torch.float32)
            yield part.view(-1, item.shape[-1])

    def transform(item: Item) -> Item:
        if item.weight is None or not is_chosen(item.name):
            return item
        return replace(item, rows=partial(rows, item), weight=None, is_stored=False)

    return transform


def recoding(files: Mapping[str, Path]) -> Transform:
    """Give the 4-bit weights of layers at these paths the packed codes in ``files``, under their own scales."""

    def weight(item: Item, file: Path, write: Write = None) -> QuantizedWeight:
        assert item.weight is not None
        made = item.weight()
        packed = torch.from_file(str(file), size=made.packed.numel(), dtype=torch.uint8).view_as(made.packed)
        if write is not None:
            write(packed)
        return made.with_packed(packed)

    def transform(item: Item) -> Item:
        file = files.get(item.name.removesuffix(".weight"))
        return item if file is None else replace(item, weight=partial(weight, item, file), is_stored=False)

    return transform


def adding(adapter: StoredAdapter, replaced: Mapping[str, Tensor]) -> Transform:
    """Add an adapter to the dense weights that have one, in fp32; ``replaced`` has weights by name that take the places
    of others."""

    def sums(item: Item, a: Tensor, b: Tensor, scale: float) -> Iterator[Tensor]:
        done = 0
        for part in item.rows():
            yield part.float() + (b[done : done + len(part)].float() @ a.float()) * scale
            done += len(part)

    def transform(item: Item) -> Item:
        if (tensor := replaced.get(item.name)) is not None:
            shape = tuple(tensor.shape)
            rows = tensor.float().reshape(-1, shape[-1])
            parts = partial(rows.split, part_size(shape) // shape[-1])
            return replace(item, shape=shape, rows=lambda: iter(parts()), weight=None, is_stored=False)
        pair = adapter.pairs.get(item.name.removesuffix(".weight"))
        return item if pair is None else replace(item, rows=partial(sums, item, *pair), is_stored=False)

    return transform


def join(
    parts: Iterable[QuantizedWeight],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: Mapping[str, Any],
    device: torch.device | str = "cpu",
    write: Write = None,
) -> QuantizedWeight:
    """The bytes of a tensor quantized whole, of its parts quantized one after another.

    ``parts`` go from the first element to the last, with fp32 scales; all but the last have an even number of whole
    blocks. ``shape`` and ``dtype`` are of the whole. With ``write``, which takes the codes of each part, it has none.
    """
    made = QuantizedWeight.empty(shape, dtype=dtype, device=device, **options)
    if made.device.type == "meta":
        return made
    if write is not None:
        made.packed = made.packed.new_empty(0)
    scales, done = torch.empty(made.absmax.shape, device=device), 0
    for part in parts:
        if write is None:
            made.packed[done // 2 :][: part.packed.numel()] = part.packed
        else:
            write(part.packed)
        scales[done // made.block_size :][: part.absmax.numel()] = part.absmax
        done += part.numel()
        del part  # before the next is made
    if done != made.numel():
        raise ValueError(f"join: the parts have {done:,} elements: expected {made.numel():,} of {list(shape)}.")
    if made.nested_absmax is None or made.nested_offset is None:
        made.absmax = scales
        return made
    nested = [torch.empty_like(t, device="cpu") for t in (made.absmax, made.nested_absmax, made.nested_offset)]
    double_quantize(scales.cpu(), *nested)
    made.absmax, made.nested_absmax, made.nested_offset = (tensor.to(device) for tensor in nested)
    return made
