"""Safetensors files read and written one tensor at a time; each way they can be broken is a UserError.

Reading goes through plain ``read`` calls: a file that shrinks while it is read is then an error with a name, and a
reading costs exactly the memory of the tensor. :class:`FileMap` maps files instead, for weights that are used as they
lie.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._io import read_json, reading, regular, unique_keys
from qlora_native.errors import UserError
from qlora_native.reference import is_finite

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MOST_DIMS = 64

STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: ``num_bytes`` bytes from byte ``start`` of ``file``; and its scales, if it has any."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    scales: StoredTensor | None = None  # of a weight in 8-bit floats

    def read(self, scratch: Scratch | None = None) -> Tensor:
        """The tensor, in memory of its own, or in ``scratch`` (then valid until the next reading through it)."""
        if scratch is not None:
            return self._fill(scratch.tensor(self.shape, self.dtype), 0)
        return self._fill(torch.empty(self.shape, dtype=self.dtype), 0)

    def read_part(self, begin: int, end: int) -> Tensor:
        """Elements ``begin`` to ``end`` of the flattened tensor, in memory of their own."""
        return self._fill(torch.empty(end - begin, dtype=self.dtype), begin)

    def _fill(self, tensor: Tensor, begin: int) -> Tensor:
        raw = tensor.view(-1).view(torch.uint8).numpy().data
        with reading(self.file), self.file.open("rb") as file:
            file.seek(self.start + begin * self.dtype.itemsize)
            if file.readinto(raw) < raw.nbytes:
                raise ValueError(
                    f"it ends at byte {file.seek(0, os.SEEK_END):,}, within tensor {self.name}"
                )
        return tensor


class Scratch:
    """Private memory that one reading after another goes through.

    Its own mapping goes back to the system with the object; tensors from malloc would leave holes in the heap that stay
    counted as used.
    """

    def __init__(self, num_bytes: int) -> None:
        # The default, MAP_SHARED, would be memory that limits count but RssAnon does not show. Windows has no flags.
        private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        self._memory = mmap.mmap(-1, max(num_bytes, 1), **private)
        self._start = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor over the start of the memory, valid until the next one is asked for."""
        return view_of(self._memory, dtype, self._start, shape)

    def behind(self, num_bytes: int) -> Scratch:
        """The same memory without its first ``num_bytes``."""
        rest = copy(self)
        rest._start += num_bytes
        return rest


LEAST_MAPPED = 64 << 10  # bytes of a tensor that is mapped; smaller ones are read and checked
_mapped: weakref.WeakSet[_C.MappedFile] = weakref.WeakSet()


def map_file(path: Path) -> Any:
    """The bytes of a file as a buffer, mapped: read when they are used, copied where they are written."""
    with reading(path):
        regular(path)
        if not hasattr(_C, "MappedFile"):
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = _C.MappedFile(str(path))
    _mapped.add(mapped)
    return mapped


def view_of(buffer: Any, dtype: torch.dtype, begin: int, shape: tuple[int, ...]) -> Tensor:
    """A tensor over a buffer's bytes from ``begin`` on, which it keeps, in a storage of its own."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin).view(shape)


class FileMap:
    """Tensors as views of mapped files: read when they are touched, shared by processes, copied where they are written.

    ``copied`` has the reason by name for each tensor that had to be copied. These and small ones are for another
    function to ``read``.
    """

    def __init__(self, read: Callable[..., Tensor]) -> None:
        self._read = read
        self._map = cache(map_file)
        self.copied: dict[str, str] = {}

    def read(self, stored: StoredTensor, scratch: Scratch | None = None) -> Tensor:
        """A view, which keeps its file mapped, or what is read of a tensor that is small, misaligned, or to be
        converted."""
        if stored.num_bytes < LEAST_MAPPED:
            return self._read(stored, scratch)
        if scratch is not None or stored.scales is not None:
            self.copied[stored.name] = f"it is stored as {stored.dtype}"
        elif stored.start % stored.dtype.itemsize:
            self.copied[stored.name] = f"it begins at byte {stored.start:,}"
        else:
            with reading(stored.file):
                return view_of(self._map(stored.file), stored.dtype, stored.start, stored.shape)
        return self._read(stored, scratch)


class MappedPart(NamedTuple):
    """Bytes ``begin`` to ``end`` of a mapped file."""

    file: _C.MappedFile
    begin: int
    end: int


def mapped_part(tensor: Tensor) -> MappedPart | None:
    """Where a tensor lies in a mapped file; None if it lies elsewhere."""
    if tensor.device.type != "cpu":
        return None
    address = tensor.data_ptr()
    for file in _mapped:
        begin = address - file.address
        if 0 <= begin < file.num_bytes:
            return MappedPart(file, begin, begin + tensor.nbytes)
    return None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder's safetensors files by name, from the headers.

    Raises :class:`UserError` when a file is missing, truncated, not safetensors, or lacks a tensor that the index
    promises.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return read_header(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_index(folder / INDEX_NAME)
    if pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth")):
        raise UserError(
            f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when opened; "
            f"expected {WEIGHTS_NAME}; load it once in transformers and call save_pretrained on another folder."
        )
    raise UserError(
        f"{folder} holds no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}; copy the whole model again."
    )


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """UserError for a NaN or an infinity."""
    if not is_finite(tensor):
        raise UserError(
            f"{where}: tensor {name} holds a NaN or an infinity; copy or train the model again."
        )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, by name, checked against the length of the file."""
    with reading(path):
        size = regular(path).stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == b"version ":
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}."
                )
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its first 8 bytes, {prefix!r}, are no header length")
            end = 8 + length
            if end > size:
                raise ValueError(f"it holds {size:,} bytes: expected {end:,} or more")
            entries = json.loads(file.read(length), object_pairs_hook=unique_keys)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, end) for name, entry in entries.items()}
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
            if tensor.start != end:
                raise ValueError(
                    f"{tensor.name} begins at byte {tensor.start:,}, the one before it ends at {end:,}"
                )
            end += tensor.num_bytes
        if end != size:
            raise ValueError(f"it holds {size:,} bytes: expected {end:,}")
        return tensors


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_sound = all(type(size) is int and 0 <= size < 1 << 63 for size in (*shape, begin, end))
        dtype = STORED_DTYPES.get(kind)
    except (TypeError, KeyError, ValueError):
        is_sound = False
    if not is_sound or len(shape) > MOST_DIMS:
        raise ValueError(f"the header entry of {name} is malformed")
    if dtype is None:
        raise UserError(
            f"{path}: tensor {name} has dtype {kind}: expected one of {', '.join(STORED_DTYPES)}."
        )
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise ValueError(
            f"{name} is {kind} {[*shape]}, {num_bytes:,} bytes, but the header gives it {end - begin:,}"
        )
    return StoredTensor(name, path, dtype, shape, data_start + begin, num_bytes)


def _read_index(index: Path) -> dict[str, StoredTensor]:
    names = read_json(index, object_pairs_hook=unique_keys).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(
            f'{index} is not an index of shards: expected JSON with a "weight_map"; copy the file again.'
        )
    files = sorted(set(names.values()))
    if outside := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise UserError(f"{index} names {some_of(outside)}: expected files in {index.parent}.")
    if absent := [file for file in files if not (index.parent / file).is_file()]:
        raise UserError(
            f"{index.parent} lacks {len(absent)} of the {len(files)} weight files that {INDEX_NAME} names "
            f"({some_of(absent)}); download or copy them again."
        )
    headers = {file: read_header(index.parent / file) for file in files}
    for name, file in names.items():
        if name not in headers[file]:
            raise UserError(
                f"{index.parent / file} lacks tensor {name}, which {INDEX_NAME} places there; the two are of "
                "different models."
            )
    return {name: headers[file][name] for name, file in names.items()}


def first_sentence(error: BaseException) -> str:
    """The first sentence of another library's message, ending in one full stop."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return re.split(r"\.\s|\n", text or type(error).__name__)[0].rstrip(".") + "."


def some_of(names: list[str], most: int = 3) -> str:
    """The first names in words, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


MOST_SHORT_BYTES = 512  # of a tensor without a shape: room is kept in the header for its offsets
ALIGNMENT = 64  # bytes of a cache line: tensors are used where they lie in a mapped file


class Output(NamedTuple):
    """A tensor to be written; without a shape it is uint8 [length], and the length is known when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None

    @property
    def num_bytes(self) -> int:
        """Bytes, or the most there may be."""
        return MOST_SHORT_BYTES if self.shape is None else math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """One file, written in a ``with`` block. ``write`` appends to a tensor, whatever the order of the tensors. Errors
    name the ``source`` of what is written.

    The format has no room between tensors: those of whole cache lines come first and so begin with one.
    """

    def __init__(self, path: Path, outputs: Iterable[Output], source: Path | None = None) -> None:
        def place(output: Output) -> tuple[Any, ...]:
            return (
                output.shape is None,
                output.num_bytes % ALIGNMENT > 0,
                -output.dtype.itemsize,
                output.name,
            )

        self.outputs = sorted(outputs, key=place)
        self._begin: dict[str, int] = {}
        self._end = 0  # where the next tensor without a shape goes
        for output in self.outputs:
            if output.shape is not None:
                self._begin[output.name] = self._end
                self._end += output.num_bytes
        self._written: Counter[str] = Counter()
        most = sum(output.num_bytes for output in self.outputs)  # no offset has more digits
        longest = self._header(
            {output.name: (most, most + MOST_SHORT_BYTES) for output in self.outputs}
        )
        self._header_bytes = len(longest) + -(8 + len(longest)) % ALIGNMENT
        self._file, self._source = path.open("wb"), source or path

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            for output in self.outputs:
                if (
                    output.shape is not None
                    and (done := self._written[output.name]) != output.num_bytes
                ):
                    raise RuntimeError(
                        f"{output.name}: {done} of {output.num_bytes} bytes were written."
                    )
            header = self._header(
                {name: (begin, begin + self._written[name]) for name, begin in self._begin.items()}
            )
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))

    def write(self, name: str, part: Tensor) -> None:
        """The next elements of the tensor, contiguous, in its dtype; all of it for one without a shape. UserError for
        floats that are not finite."""
        check_finite(part, name, str(self._source))
        raw = part.contiguous().view(-1).view(torch.uint8).numpy()
        if name not in self._begin:
            self._begin[name] = self._end
            self._end += raw.nbytes
        self._file.seek(8 + self._header_bytes + self._begin[name] + self._written[name])
        self._file.write(raw.data)
        self._written[name] += raw.nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors written so far."""
        return self._written.total()

    def _header(self, spans: Mapping[str, tuple[int, int]]) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for output in sorted(self.outputs, key=lambda output: spans[output.name]):
            begin, end = spans[output.name]
            shape = [end - begin] if output.shape is None else list(output.shape)
            entries[output.name] = {
                "dtype": _NAMES[output.dtype],
                "shape": shape,
                "data_offsets": [begin, end],
            }
        return json.dumps(entries, separators=(",", ":")).encode()


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within it another library's module has ``value`` under this name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def aligned_files() -> AbstractContextManager[None]:
    """Within it ``save_pretrained`` writes files whose tensors are aligned as :class:`ShardWriter` aligns them."""
    from transformers import modeling_utils

    def save(tensors: Mapping[str, Tensor], path: Path, **_: object) -> None:
        outputs = [Output(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with ShardWriter(Path(path), outputs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    return replaced(modeling_utils, "safe_save_file", save)
