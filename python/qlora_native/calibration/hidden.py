"""The hidden states of the calibration set between two layers: in memory while they are few, else in a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

MOST_IN_MEMORY = 1 << 28  # bytes


class HiddenStates:
    """Tensors [1, length, H], one a sequence: those that enter the layer at hand, and those that leave it.

    Args:
        shape: (rows, length, H). dtype: of all of them.
        folder: where the files of two layers lie, one read while the other is written; None keeps everything in
            memory, each sequence in the place of the one that it was made of.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None) -> None:
        self.shape, self.dtype, self.folder = shape, dtype, folder
        self.layer = 0  # that read() is the input of
        self._memory = torch.empty(shape, dtype=dtype) if folder is None else None

    def read(self, row: int) -> Tensor:
        """The input of the layer at hand, in memory of its own."""
        if self._memory is not None:
            return self._memory[row : row + 1].clone()
        raw = torch.empty(1, *self.shape[1:], dtype=self.dtype)
        with self.file(self.layer).open("rb", buffering=0) as file:
            file.seek(row * raw.nbytes)
            if file.readinto(memoryview(_bytes(raw))) != raw.nbytes:  # type: ignore[arg-type]
                raise OSError(f"{self.file(self.layer)} ends before row {row}")
        return raw

    def begin(self, layer: int) -> None:
        """Make room for the input of ``layer``: of the one at hand, or of the next."""
        if self.folder is not None:
            with self.file(layer).open("wb") as file:
                file.truncate(self.num_bytes)

    def write(self, row: int, value: Tensor, layer: int) -> None:
        """A part of the input of ``layer``."""
        value = value.detach().to("cpu", self.dtype).contiguous()
        if self._memory is not None:
            self._memory[row : row + 1] = value
            return
        with self.file(layer).open("r+b", buffering=0) as file:
            file.seek(row * value.nbytes)
            file.write(memoryview(_bytes(value)))  # type: ignore[arg-type]

    def sync(self, layer: int) -> None:
        """Have the system write the input of ``layer`` to the disk."""
        if self.folder is not None:
            with self.file(layer).open("rb") as file:
                os.fsync(file.fileno())

    def advance(self) -> None:
        """What was written for the next layer is now read; what was read is deleted."""
        if self.folder is not None:
            self.file(self.layer).unlink()
        self.layer += 1

    def file(self, layer: int) -> Path:
        """The file of the input of ``layer``."""
        assert self.folder is not None
        return hidden_file(self.folder, layer)

    @property
    def num_bytes(self) -> int:
        """Bytes between two layers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def hidden_file(folder: Path, layer: int) -> Path:
    """The file in ``folder`` of what enters ``layer``."""
    return folder / f"hidden-{layer:04}.bin"


def _bytes(tensor: Tensor) -> object:
    return tensor.view(-1).view(torch.uint8).numpy()
