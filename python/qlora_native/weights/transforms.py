"""Transforms of a stream: quantize, decode, put other codes in, or add an adapter, a part of a weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_native._buffers import interleave
from qlora_native.errors import UserError
from qlora_native.lora.adapter import StoredAdapter
from qlora_native.ops.quantize_4bit import double_quantize
from qlora_native.reference import non_finite_message
from qlora_native.weight import QuantizedWeight, quantize
from qlora_native.weights.files import first_sentence
from qlora_native.weights.shapes import ModelShapes
from qlora_native.weights.stream import Entry, Item, Transform, Value, part_size, slices

Write = Callable[[Tensor], object] | None


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

    def made(
        entry: Entry, parts: Iterator[Tensor], shape: tuple[int, ...], write: Write = None
    ) -> QuantizedWeight:
        def quantized() -> Iterator[QuantizedWeight]:
            done = 0
            for part in parts:
                try:
                    yield function(part.to(device), **plain)
                except ValueError as error:
                    bad = (~part.isfinite()).flatten().nonzero()
                    sentence = (
                        non_finite_message(int(bad[0]), part, done, shape)
                        if len(bad)
                        else first_sentence(error)
                    )
                    reason = sentence.partition(": ")[2]
                    raise UserError(
                        f"{entry.file}: weight {entry.name} cannot be quantized: {reason}"
                    ) from error
                done += part.numel()

        return join(quantized(), shape, meta.dtype, options, device, write)

    def weight(item: Item, write: Write = None) -> QuantizedWeight:
        return made(item.entry, item.rows(), item.shape, write)

    def values(item: Item) -> Iterator[tuple[str, Value]]:
        is_stack = item.entry.is_stack and item.name in names
        for name, value in [(item.name, weight(item))] if is_stack else item.values():
            if name in names and isinstance(value, Tensor):
                value = value.mT if name in meta.transposed else value
                rows = (part.view(-1, value.shape[-1]) for part in slices(value))
                value = made(item.entry, rows, tuple(value.shape))
            if isinstance(value, QuantizedWeight):
                interleave(value.packed)
            yield name, value

    def transform(item: Item) -> Item:
        if item.weight is not None:
            return item
        if item.name in names and item.entry.is_single:
            return replace(
                item, values=partial(values, item), weight=partial(weight, item), is_stored=False
            )
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
        packed = torch.from_file(str(file), size=made.packed.numel(), dtype=torch.uint8).view_as(
            made.packed
        )
        if write is not None:
            write(packed)
        return made.with_packed(packed)

    def transform(item: Item) -> Item:
        file = files.get(item.name.removesuffix(".weight"))
        return (
            item
            if file is None
            else replace(item, weight=partial(weight, item, file), is_stored=False)
        )

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
        return (
            item if pair is None else replace(item, rows=partial(sums, item, *pair), is_stored=False)
        )

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
        raise ValueError(
            f"join: the parts have {done:,} elements: expected {made.numel():,} of {list(shape)}."
        )
    if made.nested_absmax is None or made.nested_offset is None:
        made.absmax = scales
        return made
    nested = [
        torch.empty_like(t, device="cpu")
        for t in (made.absmax, made.nested_absmax, made.nested_offset)
    ]
    double_quantize(scales.cpu(), *nested)
    made.absmax, made.nested_absmax, made.nested_offset = (tensor.to(device) for tensor in nested)
    return made
