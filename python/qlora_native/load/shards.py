"""Safetensors files written part by part: what a tensor costs in memory is the part at hand.

Every offset but those of a few short tensors is known before the first byte is written, so parts go straight to their
place. The short ones, whose length tells itself only when they are made, stand at the end of the file. The header is
written last, into room kept for it at the front, and filled up with spaces, which the format allows.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .files import DTYPES, INDEX_NAME, WEIGHTS_NAME

MOST_SHORT_BYTES = 512  # of a tensor without a shape: room is kept in the header for its offsets
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Output:
    """A tensor to be written; without a shape, uint8 [length] with the length told when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None

    @property
    def num_bytes(self) -> int:
        """Bytes, or the most there may be."""
        return MOST_SHORT_BYTES if self.shape is None else math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """One file. ``write`` appends to a tensor, whatever the order of the tensors; ``close`` when all are complete."""

    def __init__(self, path: Path, outputs: Iterable[Output]) -> None:
        self.outputs = sorted(outputs, key=lambda output: (output.shape is None, -output.dtype.itemsize, output.name))
        self._begin: dict[str, int] = {}
        position = 0
        for output in self.outputs:
            if output.shape is None:
                break
            self._begin[output.name] = position
            position += output.num_bytes
        self._end = position  # where the next tensor without a shape goes
        self._written = {output.name: 0 for output in self.outputs}
        most = sum(output.num_bytes for output in self.outputs)  # no offset has more digits
        longest = self._header({output.name: (most, most + MOST_SHORT_BYTES) for output in self.outputs})
        self._header_bytes = len(longest) + -len(longest) % 8
        self._file: BinaryIO = path.open("wb")

    def write(self, name: str, part: Tensor) -> None:
        """The next elements of the tensor, contiguous, in its dtype; all of it for one without a shape."""
        raw = part.contiguous().view(-1).view(torch.uint8).numpy()
        if name not in self._begin:
            self._begin[name] = self._end
            self._end += raw.nbytes
        self._file.seek(8 + self._header_bytes + self._begin[name] + self._written[name])
        self._file.write(memoryview(raw))  # type: ignore[arg-type]
        self._written[name] += raw.nbytes

    def close(self) -> None:
        """Write the header. Raises RuntimeError if a tensor lacks a part."""
        for output in self.outputs:
            if output.shape is not None and self._written[output.name] != output.num_bytes:
                raise RuntimeError(
                    f"{output.name}: {self._written[output.name]} of {output.num_bytes} bytes were written."
                )
        spans = {name: (begin, begin + self._written[name]) for name, begin in self._begin.items()}
        header = self._header(spans)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors written so far."""
        return sum(self._written.values())

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _header(self, spans: Mapping[str, tuple[int, int]]) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for output in sorted(self.outputs, key=lambda output: spans[output.name]):
            begin, end = spans[output.name]
            shape = [end - begin] if output.shape is None else list(output.shape)
            entries[output.name] = {"dtype": _NAMES[output.dtype], "shape": shape, "data_offsets": [begin, end]}
        return json.dumps(entries, separators=(",", ":")).encode()


def shard_names(count: int) -> list[str]:
    """File names as transformers gives them."""
    if count == 1:
        return [WEIGHTS_NAME]
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index that says which file holds which tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
