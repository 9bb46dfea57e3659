"""Optimizer states that may leave memory: the arenas that hold them, and the moves between memory and the page file.

A step finds its parameters' places here (:meth:`Pages.numbers`) and calls the native step with the pager, which
(cpp/python/paged_order.h, cpp/cpu/files/paging.h) reads ahead and sends out while the step goes through them.

On the CPU an arena lies in memory or in a page file (:class:`HostPages`); ``device_pages`` has those of CUDA devices.
A state is a view of an arena, which it keeps alive. It stays valid, at its address, wherever the bytes are: what is
touched while it is paged out comes back, at the speed of the disk.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from qlora_native import _C, _native
from qlora_native._memory import free_memory
from qlora_native.ops._operands import part_of
from qlora_native.ops._optim import StepTable

Paged = Literal["auto"] | bool
State = dict[str, Tensor]
Moments = dict[str, torch.dtype]  # name of a state -> dtype of its 8-bit codes
Wanted = Sequence[tuple[Tensor, bool]]  # parameters, and whether their states are 8-bit codes
Form = tuple[int, int, bool]  # elements, number of moments, whether they are 8-bit codes

CHUNK_BYTES = 16 << 20  # at most: the disk streams, and many fit a budget
CHUNKS_IN_BUDGET = 16
LEAST_BUDGET: int = 256 * _C.page_bytes  # an 8-bit state cannot be split finer than 130 pages


class PagingStatistics(TypedDict):
    """Of the states that may leave memory, in bytes and seconds; all are 0 where there are none."""

    state_bytes: int
    resident_bytes: int  # of them in memory now, as the system counts
    paged_out_bytes: int  # of them in the page file alone
    bytes_in: int  # brought into memory from the page file so far
    bytes_out: int  # sent there from memory so far
    stalls: int  # times that a step waited for states
    stall_seconds: float


def state_forms(
    moments: Moments, param: Tensor, coded: bool
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each moment of a parameter and, behind them, of the scales of codes."""
    part = part_of(param)
    forms = {name: (part.shape, codes if coded else torch.float32) for name, codes in moments.items()}
    if coded:
        blocks = torch.Size([-(-part.numel() // _native.STATE_BLOCK)])
        forms |= {f"{name}_absmax": (blocks, torch.float32) for name in moments}
    return forms


@dataclass(eq=False)
class Pages:
    """The arenas of one optimizer on one device, and the states reserved in them."""

    owner: str  # in messages
    moments: Moments
    paged: Paged
    folder: Path | None  # of the page file
    # Bytes in memory while states are paged out, None for a share of what is free at each step.
    budget: int | None
    stores: list[Any] = field(default_factory=list, init=False)
    # A parameter's number and states.
    places: dict[Tensor, tuple[int, State]] = field(default_factory=dict, init=False)
    # States are ordinary tensors, which pinned memory could take.
    could_pin: bool = field(default=False, init=False)
    # The host wrote states, which may have moved their pages.
    moved: bool = field(default=False, init=False)
    _numbers: Iterator[int] = field(default_factory=count, init=False)
    _taken: set[Tensor] = field(default_factory=set, init=False)

    def reserve(self, wanted: Wanted) -> None:
        """Make a place for each of these parameters' states, in one arena more."""
        raise NotImplementedError

    def _forms(self, wanted: Wanted) -> list[Form]:
        return [(part_of(param).numel(), len(self.moments), coded) for param, coded in wanted]

    def _add(self, store: Any, wanted: Wanted, places: Sequence[tuple[int, ...]]) -> None:
        """Give each parameter its place in a new arena: the offsets of two moments, used or not, and their scales."""
        for (param, coded), offsets in zip(wanted, places, strict=True):
            forms = state_forms(self.moments, param, coded).items()
            used = *offsets[: len(self.moments)], *offsets[2:]
            state = {
                name: self._view(store, offset, shape, dtype)
                if shape.numel()
                else torch.zeros(shape, dtype=dtype, device=param.device)
                for (name, (shape, dtype)), offset in zip(forms, used, strict=False)
            }
            self.places[param] = next(self._numbers), state
        self.stores.append(store)

    def _view(self, store: Any, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor in a store's bytes, with a storage of its own: saving it saves nothing beside it."""
        return torch.frombuffer(store, dtype=dtype, count=shape.numel(), offset=offset).view(shape)

    def take(self, param: Tensor, blank: bool) -> State:
        """The states that were reserved for a parameter, zeros if ``blank``, else whatever they hold."""
        state = self.places[param][1]
        was_taken = param in self._taken
        if blank and was_taken:
            self.wait_until_readable()
            for tensor in state.values():
                tensor.zero_()
        self.moved |= was_taken or not blank
        self._taken.add(param)
        return state

    def numbers(self, table: StepTable) -> array[int]:
        """The numbers of the places of a table's parameters; -1 for one whose states are not those reserved."""
        if table.numbers is None:
            table.numbers = array("q")
            for param, state in zip(table.params, table.states, strict=True):
                number, place = self.places.get(param, (-1, {}))
                table.numbers.append(
                    number if all(state.get(name) is t for name, t in place.items()) else -1
                )
        return table.numbers

    def wait_until_readable(self) -> None:
        """Wait for states that are still on their way into the host's memory."""

    def keep_within_budget(self) -> None:
        """Send everything out if more is resident than may be, after a step that moved nothing itself."""

    def state_bytes(self) -> int:
        return sum(store.num_bytes for store in self.stores)


@dataclass(eq=False)  # without it __post_init__ would not be called
class HostPages(Pages):
    """Arenas in memory or in a page file. The caller sees to it that there is one move at a time."""

    def __post_init__(self) -> None:
        temporary = tempfile.gettempdir()
        self.folder = self.folder or Path("/var/tmp" if _C.lies_in_memory(temporary) else temporary)
        self.pager = _C.Pager()
        self.largest_chunk = 0
        self.has_file = True  # or may have one
        self._process = os.getpid()

    def reserve(self, wanted: Wanted) -> None:
        """Make room for the states of these parameters, all 0, in one arena more. PageFileError (an OSError) if a page
        file is required and cannot be had."""
        chunk_bytes = (
            CHUNK_BYTES if self.budget is None else min(CHUNK_BYTES, self.budget // CHUNKS_IN_BUDGET)
        )
        block_bytes = _C.block_bytes if chunk_bytes >= 4 * _C.block_bytes else _C.page_bytes
        layout = _C.PagePlan(self._forms(wanted), _C.page_bytes, chunk_bytes, block_bytes)
        try:
            store = _C.FileStore(layout.num_bytes, str(self.folder), self.paged is True)
        except MemoryError:
            store = _C.FileStore(layout.num_bytes, str(self.folder), True)
        self._add(store, wanted, layout.places)
        self.pager.add(store, layout)
        self.largest_chunk = max(self.largest_chunk, layout.largest_chunk)

    def budget_now(self) -> int:
        """Bytes that the next step may have resident. RuntimeError in a process forked from the one that pages."""
        in_file = self.states_paged_out()
        if in_file and os.getpid() != self._process:
            raise RuntimeError(
                f"{self.owner}: its states lie in a page file of process {self._process}, from which this one was "
                "forked: make the optimizer in the process that steps it."
            )
        if self.budget is not None or not in_file:
            return self.budget or 0
        free = free_memory()
        half = self.state_bytes() if free is None else free.bytes // 2
        return max(LEAST_BUDGET, 4 * self.largest_chunk, half)

    def keep_within_budget(self) -> None:
        if self.states_paged_out() and self._resident() > self.budget_now():
            self.pager.evict()

    def page_out(self) -> None:
        """Move what is in memory into the page file and send it all out; where there can be none, warn once."""
        if not self.has_file:
            return
        try:
            self.pager.to_file()
        except _C.PageFileError as error:
            self.has_file = False
            warnings.warn(f"{self.owner}: the states stay in memory. {error}", stacklevel=3)
            return
        self.pager.evict()

    def page_in(self) -> None:
        """Move the states back into ordinary memory, as far as there is room, unless ``paged`` is True."""
        if self.paged is not True:
            self.pager.to_memory()

    def states_paged_out(self) -> int:
        """Bytes of states in the page file, resident or not."""
        return sum(store.bytes_in_file for store in self.stores)

    def states_in_memory(self) -> int:
        """Bytes of states in ordinary memory that a page file can take."""
        return self.state_bytes() - self.states_paged_out() if self.has_file else 0

    def _resident(self) -> int:
        return sum(store.resident_bytes() for store in self.stores)

    def statistics(self) -> tuple[float, ...]:
        """The values of :class:`PagingStatistics`."""
        resident, pager = self._resident(), self.pager
        counts = self.state_bytes(), resident, max(0, self.states_paged_out() - resident)
        moved = (
            sum(getattr(store, way) for store in self.stores) for way in ("bytes_in", "bytes_out")
        )
        return *counts, *moved, pager.stalls, pager.stall_seconds


def is_coded(state: Mapping[str, Any]) -> bool:
    """Whether the moments of a parameter are 8-bit codes."""
    return "exp_avg_absmax" in state
