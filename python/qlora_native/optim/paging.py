"""Optimizer states that may leave memory: the arenas that hold them, and the moves between memory and the page file.

On the CPU an arena lies in memory or in a page file (:class:`HostPages`); ``device_pages`` has those of CUDA devices.
A state is a view of an arena, which it keeps alive. It stays valid, at its address, wherever the bytes are: what is
touched while it is paged out comes back, at the speed of the disk.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from qlora_native import _C, _native
from qlora_native._memory import free_memory
from qlora_native._pages import BLOCKS
from qlora_native.ops._operands import part_of
from qlora_native.ops._optim import Plan

Paged = Literal["auto"] | bool
State = dict[str, Tensor]
Moments = dict[str, torch.dtype]  # name of a state -> dtype of its 8-bit codes
States = Mapping[Tensor, dict[str, Any]]  # of an optimizer, by parameter
Wanted = Sequence[tuple[Tensor, bool]]  # parameters, and whether their states are 8-bit codes
Form = tuple[int, int, bool]  # elements, number of moments, whether they are 8-bit codes

CHUNK_BYTES = 16 << 20  # at most: the disk streams, and many fit a budget
CHUNKS_IN_BUDGET = 16
LEAST_BUDGET: int = 256 * _C.page_bytes  # an 8-bit state cannot be split finer than 130 pages
LEAST_WATCHED = 1 << 20  # bytes of states; fewer are not worth a thread
PAGING_DEFAULTS: dict[str, Any] = {"paged": "auto", "page_dir": None, "page_budget": None}


class PagingStatistics(TypedDict):
    """Of the states that may leave memory, in bytes and seconds; all are 0 where there are none."""

    state_bytes: int
    resident_bytes: int  # of them in memory now, as the system counts
    paged_out_bytes: int  # of them in the page file alone
    bytes_in: int  # brought into memory from the page file so far
    bytes_out: int  # sent there from memory so far
    stalls: int  # times that a step waited for states
    stall_seconds: float


def new_states(
    moments: Moments, param: Tensor, coded: bool, make: Callable[[int, torch.Size, torch.dtype], Tensor]
) -> State:
    """The moments of a parameter and, beside codes, their scales, from ``make(place, shape, dtype)``: ``place`` is the
    index in an arena's tuple of offsets, which has the moments first and their scales from 2 on."""
    part = part_of(param)
    blocks = torch.Size([-(-part.numel() // _native.STATE_BLOCK)])
    state: State = {}
    for i, (name, codes) in enumerate(moments.items()):
        state[name] = make(i, part.shape, codes if coded else torch.float32)
        if coded:
            state[f"{name}_absmax"] = make(2 + i, blocks, torch.float32)
    return state


class Pages:
    """The arenas of one optimizer, named ``owner`` in messages, on one device, and the states reserved in them.

    ``moments`` are names of the states, with the dtype of their codes; ``budget`` is bytes that may be in memory while
    states are paged out, None for a share of what is free at each step.
    """

    def __init__(self, owner: str, moments: Moments, paged: Paged, budget: int | None) -> None:
        self.owner = owner
        self.moments = moments
        self.paged = paged
        self.budget = budget
        self.stores: list[Any] = []
        self.could_pin = False  # the states are ordinary tensors of a device that pinned host memory could take
        self.places: dict[Tensor, tuple[int, State]] = {}  # of a parameter: its number, its states
        self._num_places = 0
        self._taken: set[Tensor] = set()

    def _forms(self, wanted: Wanted) -> list[Form]:
        return [(part_of(param).numel(), len(self.moments), coded) for param, coded in wanted]

    def _add(self, store: Any, wanted: Wanted, places: Sequence[Any]) -> None:
        """Give each parameter its place in a new arena, as offsets of its moments and their scales."""
        for (param, coded), offsets in zip(wanted, places, strict=True):
            state = new_states(self.moments, param, coded, partial(self._view, store, offsets))
            self.places[param] = self._num_places, state
            self._num_places += 1
        self.stores.append(store)

    def _view(self, store: Any, offsets: Sequence[int], i: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor in a store's bytes, with a storage of its own: saving it saves nothing beside it."""
        if shape.numel() == 0:
            return torch.zeros(shape, dtype=dtype)
        return torch.frombuffer(store, dtype=dtype, count=shape.numel(), offset=offsets[i]).view(shape)

    def take(self, param: Tensor, blank: bool) -> State:
        """The states that were reserved for a parameter, zeros if ``blank``, else whatever they hold."""
        state = self.places[param][1]
        if blank and param in self._taken:
            for tensor in state.values():
                tensor.zero_()
        self._taken.add(param)
        return state

    def numbers(self, plan: Plan) -> array[int]:
        """The numbers of the places of a plan's parameters; -1 for one whose states are not those reserved."""
        if plan.numbers is None:
            plan.numbers = array("q")
            for param, state in zip(plan.params, plan.states, strict=True):
                number, place = self.places.get(param, (-1, {}))
                plan.numbers.append(number if all(state.get(name) is t for name, t in place.items()) else -1)
        return plan.numbers

    def reserve(self, wanted: Wanted) -> None:
        """Make room for the states of these parameters, all 0, in one arena more."""
        raise NotImplementedError

    def wait_until_readable(self) -> None:
        """Wait for states that are still on their way into the host's memory."""

    def keep_within_budget(self) -> None:
        """Send everything out if more is resident than may be, after a step that moved nothing itself."""

    def state_bytes(self) -> int:
        return sum(store.num_bytes for store in self.stores)

    def _statistics(self, resident: int, paged_out: int, moved: Sequence[tuple[int, int]]) -> PagingStatistics:
        """``moved``: bytes in and bytes out of each store."""
        return {
            "state_bytes": self.state_bytes(),
            "resident_bytes": resident,
            "paged_out_bytes": paged_out,
            "bytes_in": sum(bytes_in for bytes_in, _ in moved),
            "bytes_out": sum(bytes_out for _, bytes_out in moved),
            "stalls": 0,
            "stall_seconds": 0.0,
        }


class HostPages(Pages):
    """Arenas in memory or in a page file in ``folder``. The caller sees to it that there is one move at a time."""

    def __init__(self, owner: str, moments: Moments, paged: Paged, folder: Path | None, budget: int | None) -> None:
        super().__init__(owner, moments, paged, budget)
        temporary = tempfile.gettempdir()
        self.folder = folder or Path("/var/tmp" if _C.lies_in_memory(temporary) else temporary)
        self.pager = _C.Pager()
        self.largest_chunk = 0
        self.has_file = True  # or may have one
        self._process = os.getpid()

    def reserve(self, wanted: Wanted) -> None:
        """PageFileError (an OSError) if a page file is required and cannot be had."""
        chunk_bytes = CHUNK_BYTES if self.budget is None else min(CHUNK_BYTES, self.budget // CHUNKS_IN_BUDGET)
        block_bytes = _C.block_bytes if chunk_bytes >= 4 * _C.block_bytes else _C.page_bytes
        plan = _C.PagePlan(self._forms(wanted), _C.page_bytes, chunk_bytes, block_bytes)
        try:
            store = _C.FileStore(plan.num_bytes, str(self.folder), self.paged is True)
        except MemoryError:
            store = _C.FileStore(plan.num_bytes, str(self.folder), True)
        self._add(store, wanted, plan.places)
        self.pager.add(store, plan)
        self.largest_chunk = max(self.largest_chunk, plan.largest_chunk)

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
            warnings.warn(f"{self.owner}: the states stay in memory. {error}", stacklevel=5)
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

    def statistics(self) -> PagingStatistics:
        resident = self._resident()
        moved = [(store.bytes_in, store.bytes_out) for store in self.stores]
        statistics = self._statistics(resident, max(0, self.states_paged_out() - resident), moved)
        return {**statistics, "stalls": self.pager.stalls, "stall_seconds": self.pager.stall_seconds}


class Paging:
    """The states of one optimizer that may leave memory: their arenas, a :class:`Pages` a device, and the moves.

    ``new_pages`` makes a device's pages, None for one without a page store: states there are ordinary tensors. Steps
    and moves take turns: each is done within :meth:`alone`.
    """

    def __init__(
        self, owner: str, paged: Paged, budget: int | None, new_pages: Callable[[torch.device], Pages | None]
    ) -> None:
        if paged not in (True, False, "auto"):
            raise ValueError(f"{owner}: paged is {paged!r}: expected 'auto', True or False.")
        if budget is not None and budget < LEAST_BUDGET:
            raise ValueError(
                f"{owner}: page_budget is {budget}: expected at least {LEAST_BUDGET} bytes, or None for what the free "
                "memory allows."
            )
        self.paged = paged
        self._new_pages = new_pages
        self.pages: dict[torch.device, Any] = {}
        self._lock = threading.RLock()
        self._process = os.getpid()

    def alone(self) -> threading.RLock:
        """The lock of this process: one that a fork left locked would stay so."""
        if self._process != os.getpid():
            self._lock = threading.RLock()
            self._process = os.getpid()
        return self._lock

    def reserve(self, wanted: Wanted) -> bool:
        """Make places for the states of these parameters that have none, in one arena more a device.

        Returns whether from now on the free memory is to be watched: on a device, every step looks.
        """
        if self.paged is False:
            return False
        missing: dict[torch.device, list[tuple[Tensor, bool]]] = {}
        for param, coded in wanted:
            if not self._has_place(param, coded):
                missing.setdefault(param.device, []).append((param, coded))
        is_watched = False
        for device, chosen in missing.items():
            pages = self.pages.get(device) or self._new_pages(device)
            if pages is None:
                continue
            before = pages.state_bytes()
            BLOCKS.release()  # states come to stay, and what is kept for later makes room
            pages.reserve(chosen)
            self.pages[device] = pages
            is_watched |= isinstance(pages, HostPages) and before < LEAST_WATCHED <= pages.state_bytes()
        return is_watched and self.paged == "auto"

    def _has_place(self, param: Tensor, coded: bool) -> bool:
        """Whether states of this form were reserved for the parameter."""
        pages = self.pages.get(param.device)
        return pages is not None and param in pages.places and is_coded(pages.places[param][1]) == coded

    def take(self, param: Tensor, coded: bool, blank: bool) -> State | None:
        """The states reserved for a parameter in this form, zeros if ``blank``; None if there are none."""
        return self.pages[param.device].take(param, blank) if self._has_place(param, coded) else None

    def copy_displaced(self, loaded: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """Copy loaded states that lie in another parameter's place and would be overwritten before they are read."""
        places = [item for pages in self.pages.values() for item in pages.places.items()]
        owner = {tensor.data_ptr(): param for param, (_, place) in places for tensor in place.values()}
        for param, state in loaded:
            for key, value in state.items():
                if isinstance(value, Tensor) and owner.get(value.data_ptr(), param) is not param:
                    state[key] = value.clone()

    def wait_until_readable(self) -> None:
        """Wait for states that are still on their way into the host's memory."""
        for pages in self.pages.values():
            pages.wait_until_readable()

    def page_out(self, states: States) -> None:
        """Send all states out of memory, of which ``states`` are the optimizer's."""
        for pages in self.pages.values():
            if pages.could_pin:
                self.pin(pages, states)
            pages.page_out()

    def page_in(self) -> None:
        """Bring states that "auto" sent out back into ordinary memory, as far as there is room."""
        for pages in self.pages.values():
            pages.page_in()

    def pin(self, pages: Any, states: States) -> None:
        """Move states that are ordinary tensors of a device into pinned host memory, for good."""
        pages.use_pinned_memory()
        found = _on_device(states, pages.device)
        if found:
            pages.reserve([(param, is_coded(state)) for param, state in found.items()])
        for param, state in found.items():
            place = pages.take(param, blank=False)
            for name, tensor in place.items():
                tensor.copy_(state[name])
            state.update(place)

    def states_in_memory(self, states: States) -> int:
        """Bytes of states in ordinary memory that :meth:`page_out` would free; 0 if no page file can be had."""
        total = 0
        for device, pages in list(self.pages.items()):
            total += pages.states_in_memory()
            if pages.could_pin:
                found = _on_device(states, device).values()
                total += sum(t.nbytes for state in found for name, t in state.items() if name != "step")
        return total

    def states_paged_out(self) -> int:
        """Bytes of states in the page file; some may be resident."""
        return sum(pages.states_paged_out() for pages in list(self.pages.values()))

    def statistics(self) -> PagingStatistics:
        """Those of all devices together."""
        found: list[Any] = [pages.statistics() for pages in list(self.pages.values())]
        return PagingStatistics(**{key: sum(each[key] for each in found) for key in PagingStatistics.__annotations__})  # type: ignore[typeddict-item]


def is_coded(state: Mapping[str, Any]) -> bool:
    """Whether the moments of a parameter are 8-bit codes."""
    return "exp_avg_absmax" in state


def _on_device(states: States, device: torch.device) -> dict[Tensor, dict[str, Any]]:
    return {param: state for param, state in list(states.items()) if state and param.device == device}
