"""The optimisers' tables in device memory, and steps over them that neither wait for the device nor read it.

A table is the rows of ``_tensor_rows`` as they are, with chunks that depend on sizes alone. What changes from step to
step, addresses of gradients and learning rates, is copied there when it has changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from . import _cuda_kernels
from ._tensor_rows import address_of

ADAMW, LION, NORM = "adamw_step", "lion_step", "gradient_norm"


def _upload(values: array[int] | array[float], target: torch.Tensor) -> None:
    """Host numbers into ``target``, in the order of the current stream. From pageable memory the copy would wait."""
    source = torch.frombuffer(values, dtype=target.dtype).view(target.shape)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


class Scaling(NamedTuple):
    """What gradients are multiplied by. The tensors are fp32 [1] on the device, or None."""

    grad_factor: float = 1.0
    max_norm: float | None = None  # clips the norm of all gradients; skips the step if it is not finite
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


class DeviceTable:
    """Tensors of one device as the native functions read them, for the steps of one op.

    The caller keeps the tensors alive. ``grad_norm`` (float64 []) and ``skipped`` (fp32 []) are what the last step left
    on the device.
    """

    def __init__(self, module: ModuleType, op: str, rows: array[int], num_tensors: int, device: torch.device) -> None:
        self.module, self.op, self.num_tensors, self.device = module, op, num_tensors, device
        self.uses = op != NORM, op == ADAMW
        count = self._chunks(rows, 0, 0)
        chunks = array("i", bytes(8 * count))
        self._chunks(rows, chunks.buffer_info()[0], count)
        self.chunks = torch.empty(count, 2, dtype=torch.int32, device=device)
        self.tensors = torch.empty(len(rows), dtype=torch.int64, device=device)
        self.held: array[int] = array("q")  # what `tensors` holds
        self.options = torch.empty(0, dtype=torch.float64, device=device)
        self.held_options: array[float] = array("d")
        if count:
            _upload(chunks, self.chunks)
        self.workspace = torch.zeros(module.gradient_norm_workspace(count), dtype=torch.uint8, device=device)
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        self.norm = torch.zeros((), dtype=torch.float64, device=device)  # of the gradients as they stand
        self.grad_norm = torch.zeros_like(self.norm)
        self.skipped = torch.zeros((), dtype=torch.float32, device=device)

    def _chunks(self, rows: array[int], address: int, room: int) -> int:
        groups = 1 + max(rows[9 :: len(rows) // self.num_tensors], default=0) if self.num_tensors else 1
        found: int = self.module.optim_chunks(address_of(rows), self.num_tensors, *self.uses, groups, address, room)
        return found

    def _table(self, rows: array[int]) -> tuple[int, int, int, int]:
        if rows != self.held and self.num_tensors:
            self.held = array("q", rows)
            _upload(self.held, self.tensors)
        return self.tensors.data_ptr(), self.chunks.data_ptr(), self.num_tensors, self.chunks.shape[0]

    def _groups(self, options: Sequence[tuple[float, ...]]) -> tuple[int, int]:
        flat = array("d", [number for row in options for number in row])
        if flat != self.held_options:
            self.held_options = flat
            self.options = torch.empty(len(flat), dtype=torch.float64, device=self.device)
            _upload(flat, self.options)
        return self.options.data_ptr(), len(options)

    def measure(self, rows: array[int]) -> torch.Tensor:
        """The norm of the gradients, float64 [] on the device."""
        with _cuda_kernels.launching(self.device) as stream:
            workspace = self.workspace.data_ptr(), self.workspace.numel()
            self.module.gradient_norm(*self._table(rows), *workspace, self.norm.data_ptr(), stream)
        return self.norm

    def step(self, rows: array[int], options: Sequence[tuple[float, ...]], by: Scaling) -> None:
        """One step, of at most two launches; a row of ``options`` for each group, as the CPU's native function."""
        if by.max_norm is not None:
            self.measure(rows)
        with _cuda_kernels.launching(self.device) as stream:
            function = getattr(self.module, self.op)
            kind: tuple[bool, ...] = ()
            if self.op == ADAMW:  # one of Adam and AdamW, so that all groups have the same
                kind, options = (bool(options[0][-1]),), [row[:-1] for row in options]
            addresses = [0 if t is None else t.data_ptr() for t in (by.grad_scale, by.found_inf)]
            clip = (by.max_norm, *addresses, self.norm.data_ptr()) if by.max_norm is not None else (0.0, *addresses, 0)
            results = self.grad_norm.data_ptr(), self.skipped.data_ptr(), self.finished.data_ptr()
            function(*self._table(rows), *self._groups(options), *kind, by.grad_factor, *clip, *results, stream)
