"""Where the states of an optimizer on the CPU lie when they may leave memory: in arenas, in memory or in a page file.

A state is a tensor that looks into an arena and keeps it alive. It stays valid, at its address, wherever the bytes are:
what is touched while it is paged out comes back, at the speed of the disk.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from qlora_native import _C, _native
from qlora_native._memory import free_memory
from qlora_native.optim.shards import local

Paged = Literal["auto"] | bool
State = dict[str, Tensor]

CHUNK_BYTES = 16 << 20  # at most: the disk streams, and many fit a budget
CHUNKS_IN_BUDGET = 16
LEAST_BUDGET: int = 256 * _C.page_bytes  # an 8-bit state cannot be cut finer than 130 pages


class PagingStatistics(TypedDict):
    """Of the states that may leave memory, in bytes and seconds; all are 0 where there are none."""

    state_bytes: int
    resident_bytes: int  # of them in memory now, as the system counts
    paged_out_bytes: int  # of them in the page file alone
    bytes_in: int  # brought into memory from the page file so far
    bytes_out: int  # sent there from memory so far
    stalls: int  # times that a step waited for states
    stall_seconds: float


def default_folder() -> Path:
    """Where page files lie if nobody says: the folder for temporary files, or /var/tmp if that one lies in memory."""
    folder = tempfile.gettempdir()
    return Path("/var/tmp" if _C.lies_in_memory(folder) else folder)


class HostPages:
    """The arenas of one optimizer.

    Args:
        owner: named in messages.
        moments: names of the states, with the dtype of their codes.
        paged: True has the states in a page file from the start, "auto" after a ``page_out``.
        folder: of the page file.
        budget: bytes that may be resident while states are in the file; None decides by what is free at each step.
    """

    def __init__(
        self, owner: str, moments: dict[str, torch.dtype], paged: Paged, folder: Path | None, budget: int | None
    ) -> None:
        self.owner, self.moments, self.paged, self.budget = owner, moments, paged, budget
        self.folder = folder or default_folder()
        self.pager = _C.Pager()
        self.stores: list[_C.FileStore] = []
        self.largest_chunk = 0
        self.has_file = True  # or may have one
        self._process = os.getpid()
        self._places: dict[Tensor, tuple[int, State]] = {}  # of a parameter: its number, its states
        self._num_places = 0
        self._taken: set[Tensor] = set()

    # -----------------------------------------------------------------------------------------------------------------
    # Places

    def reserve(self, params: Sequence[Tensor], coded: Sequence[bool]) -> None:
        """Makes room for the states of these parameters, all 0, in one arena more.

        PageFileError, which is an OSError, if a page file is asked for and cannot be had.
        """
        forms = [
            (local(param).numel(), len(self.moments), is_coded) for param, is_coded in zip(params, coded, strict=True)
        ]
        chunk_bytes = CHUNK_BYTES if self.budget is None else min(CHUNK_BYTES, self.budget // CHUNKS_IN_BUDGET)
        block_bytes = _C.block_bytes if chunk_bytes >= 4 * _C.block_bytes else _C.page_bytes
        plan = _C.PagePlan(forms, _C.page_bytes, chunk_bytes, block_bytes)
        try:
            store = _C.FileStore(plan.num_bytes, str(self.folder), self.paged is True)
        except MemoryError:
            if self.paged is True:
                raise
            store = _C.FileStore(plan.num_bytes, str(self.folder), True)
        first = self._num_places
        self._num_places += len(params)
        for i, (param, is_coded, place) in enumerate(zip(params, coded, plan.places, strict=True)):
            self._places[param] = first + i, self._tensors(store, param, is_coded, place)
        self.pager.add(store, plan)
        self.stores.append(store)
        self.largest_chunk = max(self.largest_chunk, plan.largest_chunk)

    def _tensors(self, store: _C.FileStore, param: Tensor, coded: bool, place: tuple[int, int, int, int]) -> State:
        part = local(param)
        blocks = -(-part.numel() // _native.STATE_BLOCK)
        state: State = {}
        for i, (name, codes) in enumerate(self.moments.items()):
            state[name] = _tensor_at(store, place[i], part.shape, codes if coded else torch.float32)
            if coded:
                state[f"{name}_absmax"] = _tensor_at(store, place[2 + i], torch.Size([blocks]), torch.float32)
        return state

    def place_of(self, param: Tensor) -> State | None:
        """The states that were reserved for a parameter, or None."""
        found = self._places.get(param)
        return None if found is None else found[1]

    def take(self, param: Tensor, blank: bool) -> State:
        """Those states for use, zeros if ``blank``."""
        state = self._places[param][1]
        if blank and param in self._taken:
            for tensor in state.values():
                tensor.zero_()
        self._taken.add(param)
        return state

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, one of its states) for all that was reserved."""
        return ((param, tensor) for param, (_, state) in self._places.items() for tensor in state.values())

    def numbers(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> array[int]:
        """The pager's numbers of these parameters; -1 for one whose states are not those reserved."""
        numbers = array("q")
        for param, state in zip(params, states, strict=True):
            number, place = self._places.get(param, (-1, {}))
            numbers.append(number if all(state.get(name) is tensor for name, tensor in place.items()) else -1)
        return numbers

    # -----------------------------------------------------------------------------------------------------------------
    # Moves; the caller sees to it that there is one at a time

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
        """Sends everything out if more is resident than may be; for what went over the states without the pager."""
        if self.states_paged_out() and sum(store.resident_bytes() for store in self.stores) > self.budget_now():
            self.pager.evict()

    def page_out(self) -> None:
        """Moves what is in memory into the page file and sends it all out. If there is no such file to be had, says so
        once, and the states stay in memory."""
        if not self.has_file:
            return
        try:
            self.pager.to_file()
        except _C.PageFileError as error:
            self.has_file = False
            warnings.warn(f"{self.owner}: the states stay in memory. {error}", stacklevel=4)
            return
        self.pager.evict()

    def page_in(self) -> None:
        """Moves the states back into ordinary memory, as far as there is room, if that is where they belong."""
        if self.paged is not True:
            self.pager.to_memory()

    # -----------------------------------------------------------------------------------------------------------------
    # What is where

    def state_bytes(self) -> int:
        return sum(store.num_bytes for store in self.stores)

    def states_paged_out(self) -> int:
        """Bytes of states in the page file, resident or not."""
        return sum(store.bytes_in_file for store in self.stores)

    def states_in_memory(self) -> int:
        """Bytes of states in ordinary memory that a page file can take."""
        return self.state_bytes() - self.states_paged_out() if self.has_file else 0

    def statistics(self) -> PagingStatistics:
        resident = sum(store.resident_bytes() for store in self.stores)
        return {
            "state_bytes": self.state_bytes(),
            "resident_bytes": resident,
            "paged_out_bytes": max(0, self.states_paged_out() - resident),
            "bytes_in": sum(store.bytes_in for store in self.stores),
            "bytes_out": sum(store.bytes_out for store in self.stores),
            "stalls": self.pager.stalls,
            "stall_seconds": self.pager.stall_seconds,
        }


def _tensor_at(store: _C.FileStore, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor in a store's bytes, with a storage of its own: saving it saves nothing beside it."""
    count = shape.numel()
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(store, dtype=dtype, count=count, offset=offset).view(shape)
