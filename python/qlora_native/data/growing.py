"""Token arrays that may be larger than memory."""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path
from typing import IO

import numpy as np

from qlora_native.errors import UserError

CHUNK_BYTES = 64 << 20  # an array below this stays in memory; a larger one goes to its file in pieces of this size


class GrowingArray:
    """int32 numbers, appended one row at a time: in memory at first, then in a file that has no name.

    The file lies in ``folder``, is gone when nothing uses it any more, also after a crash, and is read through a memory
    map, whose pages the system drops and fetches as it needs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = array("i")
        self._file: IO[bytes] | None = None

    def extend(self, numbers: list[int]) -> None:
        """Append ``numbers``. UserError if the disk is full."""
        self._last.extend(numbers)
        if len(self._last) * self._last.itemsize >= CHUNK_BYTES:
            self._write()

    def finish(self) -> np.ndarray:
        """All numbers, read-only int32 [numbers]; nothing can be appended after."""
        if self._file is None:
            held = np.array(self._last, dtype=np.int32)
            held.flags.writeable = False
            return held
        self._write()
        with self._file:
            return np.memmap(self._file, dtype=np.int32, mode="r")

    def _write(self) -> None:
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed in finish()
            self._last.tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"the tokens of the data do not fit into memory and could not be written to {self._folder}: "
                f"{error.strerror or error}; make room there"
            ) from error
        del self._last[:]
