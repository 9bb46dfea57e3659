"""The optimizers' tables in device memory, and steps over them that neither wait for the device nor read it.

A table is the rows of ``_optim`` as they are, with chunks that depend on sizes alone. What changes from step to
step, addresses of gradients and learning rates, is copied there when it has changed.

A CUDA graph can hold a step. It copies its own rows to the table at every replay, but no options: those stand in
memory of their own, which :meth:`DeviceTable.write_options` writes between replays.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native._native import EXP_AVG, EXP_AVG_SQ_ABSMAX, GROUP
from qlora_native.ops import _cuda_kernels

ADAMW = "adamw_step"
NORM = "gradient_norm"


def _upload(values: array[int] | array[float] | Tensor, target: Tensor) -> None:
    """Host numbers into ``target``, in the order of the current stream. From pageable memory the copy would wait."""
    source = values if isinstance(values, Tensor) else torch.frombuffer(values, dtype=target.dtype)
    source = source.view(target.shape)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


class Scaling(NamedTuple):
    """What gradients are multiplied by. The tensors are fp32 [1] on the device, or None."""

    grad_factor: float = 1.0
    # Clips the norm of all gradients; skips the step if it is not finite.
    max_norm: float | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class DeviceTable:
    """Tensors of one device as the native functions read them, for the steps of one op.

    The caller keeps the tensors alive. ``grad_norm`` (float64 []) and ``skipped`` (fp32 []) are what the last step left
    on the device.
    """

    def __init__(
        self, module: ModuleType, op: str, rows: array[int], num_tensors: int, device: torch.device
    ) -> None:
        if _cuda_kernels.is_capturing(device):
            raise RuntimeError(
                f"{op}: its tables are not on {device} yet, and a CUDA graph cannot put them there: run one step of "
                "the optimizer, over the same parameters, before the capture."
            )
        self.module = module
        self.op = op
        self.num_tensors = num_tensors
        self.device = device
        self.uses = op != NORM, op == ADAMW
        count = self._chunks(rows, 0, 0)
        chunks = array("i", bytes(8 * count))
        self._chunks(rows, chunks.buffer_info()[0], count)
        self.chunks = torch.empty(count, 2, dtype=torch.int32, device=device)
        self.tensors = torch.empty(len(rows), dtype=torch.int64, device=device)
        self.held: array[int] = array("q")  # what `tensors` holds; empty for what no step may rely on
        self.spare: Tensor | None = self._pinned(len(rows))  # for a graph, which cannot allocate
        self.of_graphs: list[Tensor] = []  # rows that graphs copy from
        self.options = torch.empty(0, dtype=torch.float64, device=device)
        self.held_options: array[float] = array("d")
        if count:
            _upload(chunks, self.chunks)
        self.workspace = torch.zeros(
            module.gradient_norm_workspace(count), dtype=torch.uint8, device=device
        )
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        # This is the norm of the gradients as they stand.
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros_like(self.norm)
        self.skipped = torch.zeros((), dtype=torch.float32, device=device)

    def _chunks(self, rows: array[int], address: int, room: int) -> int:
        groups = 1 + max(rows[GROUP :: _C.optim_row_length], default=0)
        table = rows.buffer_info()[0], self.num_tensors
        return self.module.optim_chunks(*table, *self.uses, groups, address, room)

    def _pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def _table(self, rows: array[int]) -> tuple[int, int, int, int]:
        if self.num_tensors == 0:
            pass
        elif _cuda_kernels.is_capturing(self.device):
            source = self.spare
            self.spare = None
            source = self._pinned(len(rows)) if source is None else source
            source.copy_(torch.frombuffer(rows, dtype=torch.int64))
            self.of_graphs.append(source)
            self.tensors.copy_(source, non_blocking=True)
            self.held = array("q")
        elif rows != self.held:
            kept = array("q", rows)
            _upload(kept, self.tensors)
            self.held = array("q") if self.of_graphs else kept  # a replay writes its own
            self.spare = self._pinned(len(rows)) if self.spare is None else self.spare
        return self.tensors.data_ptr(), self.chunks.data_ptr(), self.num_tensors, self.chunks.shape[0]

    def write_options(self, options: Sequence[tuple[float, ...]]) -> None:
        """Puts a row of options for each group where the kernels read them, those of a captured step too."""
        rows = [row[:-1] for row in options] if self.op == ADAMW else options  # without `decoupled`
        flat = array("d", [number for row in rows for number in row])
        if flat == self.held_options:
            return
        if _cuda_kernels.is_capturing(self.device):
            raise RuntimeError(
                f"{self.op}: a learning rate or another option has changed since the last step, and a CUDA graph would "
                "set it back at every replay: call write_options() of the optimizer before the capture."
            )
        if len(flat) != self.options.numel():
            self.options = torch.empty(len(flat), dtype=torch.float64, device=self.device)
        self.held_options = flat
        _upload(flat, self.options)

    def measure(self, rows: array[int]) -> Tensor:
        """The norm of the gradients, float64 [] on the device."""
        with _cuda_kernels.launching(self.device) as stream:
            workspace = self.workspace.data_ptr(), self.workspace.numel()
            self.module.gradient_norm(*self._table(rows), *workspace, self.norm.data_ptr(), stream)
        return self.norm

    def step(
        self,
        rows: array[int],
        options: Sequence[tuple[float, ...]],
        by: Scaling,
        stores: Sequence[tuple[StoreTable, int]] | None = None,
    ) -> None:
        """One step, of at most two launches; a row of ``options`` for each group, as the CPU's native function.

        With states in page stores, each within so many bytes of the device, it is a launch a chunk.
        """
        if by.max_norm is not None:
            self.measure(rows)
        with _cuda_kernels.launching(self.device) as stream:
            if stores is None:
                getattr(self.module, self.op)(
                    *self._table(rows), *self._arguments(options, by), stream
                )
            for store, budget in stores or ():
                store.point_at(rows)
                addresses = store.tensors.data_ptr(), store.chunks.data_ptr(), budget
                getattr(store.native, self.op)(*addresses, *self._arguments(options, by), stream)

    def _arguments(self, options: Sequence[tuple[float, ...]], by: Scaling) -> tuple[Any, ...]:
        """What the native functions take between the table and the stream."""
        self.write_options(options)
        # One of Adam and AdamW: all groups have the same.
        kind = (bool(options[0][-1]),) if self.op == ADAMW else ()
        addresses = [0 if t is None else t.data_ptr() for t in (by.grad_scale, by.found_inf)]
        clip = (
            (by.max_norm, *addresses, self.norm.data_ptr())
            if by.max_norm is not None
            else (0.0, *addresses, 0)
        )
        results = self.grad_norm.data_ptr(), self.skipped.data_ptr(), self.finished.data_ptr()
        return self.options.data_ptr(), len(options), *kind, by.grad_factor, *clip, *results


class StoreTable:
    """Rows and chunks of a page store's tensors on the device, a run of them for each chunk of its pages.

    ``row_of``: the row of the optimizer's table that updates each tensor of the store, or -1.
    """

    def __init__(
        self, module: ModuleType, store: Any, row_of: list[int], device: torch.device
    ) -> None:
        staging_bytes = store.staging_bytes if isinstance(store, module.PinnedStore) else 0
        self.staging = torch.empty(staging_bytes, dtype=torch.uint8, device=device)
        self.native = module.StoreTable(store, row_of, self.staging.data_ptr())
        rows = torch.tensor(self.native.rows, dtype=torch.int64).view(-1, 5)
        self.sources = rows[:, 0]
        self.states = rows[:, 1:]
        chunks = torch.tensor(self.native.chunks, dtype=torch.int32).view(-1, 2)
        self.chunks = torch.empty(chunks.shape, dtype=torch.int32, device=device)
        self.tensors = torch.empty(len(rows), _C.optim_row_length, dtype=torch.int64, device=device)
        self.held: Tensor | None = None  # what `tensors` holds
        if len(chunks):
            _upload(chunks, self.chunks)

    def point_at(self, rows: array[int]) -> None:
        """Takes the addresses of parameters and gradients from the optimizer's table."""
        if not len(self.sources):
            return
        table = torch.frombuffer(rows, dtype=torch.int64).view(-1, _C.optim_row_length)[self.sources]
        table[:, EXP_AVG : EXP_AVG_SQ_ABSMAX + 1] = self.states
        if self.held is None or not torch.equal(table, self.held):
            self.held = table
            _upload(table, self.tensors)
