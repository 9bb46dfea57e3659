"""Where the states of an optimizer on a CUDA device lie when they may leave its memory.

On a device with concurrent managed access (Linux) in managed memory, whose pages move between device and host under one
address. Elsewhere (Windows, WSL2, Tegra) in pinned host memory, from which each chunk is copied to the device for its
update: with ``paged=True`` from the start, with "auto" from the first time on that memory runs short. A state is a
tensor that looks into the arena and keeps it alive.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_native import _native
from qlora_native._memory import Free, free_device_memory
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._cuda_optim import Scaling, StoreTable
from qlora_native.ops._library import say_once
from qlora_native.ops._optim_plan import Plan
from qlora_native.optim.pages import Paged, PagingStatistics, State
from qlora_native.optim.pressure import PagingPolicy
from qlora_native.optim.shards import local

CHUNK_BYTES = 32 << 20  # at most: the bus streams, and a few chunks are little beside a model
CHUNKS = 16  # at least, of an arena or of a budget, as far as tensors can be cut so fine
CHUNKS_AT_ONCE = 3  # one that comes, one that is updated, one that goes
TYPE_CODES = {torch.float32: "<f4", torch.int8: "|i1", torch.uint8: "|u1"}


class _Place:
    """A part of a store as other libraries take it in, by the CUDA array interface."""

    def __init__(self, store: Any, offset: int, count: int, dtype: torch.dtype) -> None:
        self.store = store  # kept alive by whoever keeps this
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": TYPE_CODES[dtype],
            "data": (store.address + offset, False),
            "version": 3,
        }


class DevicePages:
    """The arenas of one optimizer on one device. Arguments as of ``HostPages``; ``budget`` is bytes of the device."""

    def __init__(
        self,
        owner: str,
        moments: dict[str, torch.dtype],
        paged: Paged,
        budget: int | None,
        device: torch.device,
        module: ModuleType,
    ) -> None:
        self.owner, self.moments, self.paged, self.budget = owner, moments, paged, budget
        self.device, self.module = device, module
        self.managed: bool = module.has_concurrent_managed_access(device.index or 0)
        self._pinned = False
        if not self.managed and paged is True:
            self.use_pinned_memory()
        self.stores: list[Any] = []
        self._judge = PagingPolicy()
        self._sent_out = False  # "auto" is under pressure, or page_out was asked for
        self._moved = False  # states were written by somebody else, which may have moved their pages
        self._places: dict[Tensor, tuple[int, State]] = {}  # of a parameter: its number, its states
        self._sizes: list[int] = []  # tensors of each store
        self._taken: set[Tensor] = set()
        self._tables: tuple[Plan, list[StoreTable]] | None = None  # of the plan that stepped last

    def use_pinned_memory(self) -> None:
        """From now on states are reserved in pinned host memory; a sentence says so once."""
        self._pinned = True
        say_once(
            f"qlora_native: managed memory of {self.device} does not move while kernels run (as on Windows, WSL2 and "
            f"Tegra): {self.owner}'s paged states are in pinned host memory, and every step copies all of them."
        )

    @property
    def could_pin(self) -> bool:
        """Whether the states are ordinary tensors of the device that pinned host memory could take."""
        return not self.managed and not self._pinned

    def is_short(self) -> bool:
        """Whether less of the device than the margin is free; no answer while a graph is captured."""
        free = self.free()
        return free.bytes < free.margin and not self._is_capturing()

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    # -----------------------------------------------------------------------------------------------------------------
    # Places

    def reserve(self, params: Sequence[Tensor], coded: Sequence[bool]) -> None:
        """Makes room for the states of these parameters, all 0, in one arena more; not where they :attr:`could_pin`."""
        if self.could_pin:
            return
        forms = [
            (local(param).numel(), len(self.moments), is_coded) for param, is_coded in zip(params, coded, strict=True)
        ]
        codes_or_floats = (1 if is_coded else 4 for is_coded in coded)
        arena_bytes = len(self.moments) * sum(
            local(p).numel() * n for p, n in zip(params, codes_or_floats, strict=True)
        )
        chunk_bytes = min(CHUNK_BYTES, min(arena_bytes, self.budget or arena_bytes) // CHUNKS)
        with _cuda_kernels.launching(self.device) as stream:
            if self.managed:
                store = self.module.ManagedStore(forms, self.module.managed_page_bytes, chunk_bytes)
                store.zero(self._budget_of(store), stream)
            else:
                store = self.module.PinnedStore(forms, self.module.pinned_page_bytes, chunk_bytes)
        first = sum(self._sizes)
        for i, (param, is_coded, place) in enumerate(zip(params, coded, store.places, strict=True)):
            self._places[param] = first + i, self._tensors(store, param, is_coded, place)
        self.stores.append(store)
        self._sizes.append(len(forms))
        self._tables = None

    def _tensors(self, store: Any, param: Tensor, coded: bool, place: tuple[int, int, int, int]) -> State:
        part = local(param)
        blocks = -(-part.numel() // _native.STATE_BLOCK)
        state: State = {}
        for i, (name, codes) in enumerate(self.moments.items()):
            state[name] = self._tensor_at(store, place[i], part.shape, codes if coded else torch.float32)
            if coded:
                state[f"{name}_absmax"] = self._tensor_at(store, place[2 + i], torch.Size([blocks]), torch.float32)
        return state

    def _tensor_at(self, store: Any, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        count = shape.numel()
        on_device = self.managed and self.device.type == "cuda"
        if count == 0:
            return torch.zeros(shape, dtype=dtype, device=self.device if on_device else "cpu")
        if on_device:
            return torch.as_tensor(_Place(store, offset, count, dtype), device=self.device).view(shape)
        return torch.frombuffer(store, dtype=dtype, count=count, offset=offset).view(shape)

    def place_of(self, param: Tensor) -> State | None:
        """The states that were reserved for a parameter, or None."""
        found = self._places.get(param)
        return None if found is None else found[1]

    def take(self, param: Tensor, blank: bool) -> State:
        """Those states for use, zeros if ``blank``."""
        state = self._places[param][1]
        if blank and param in self._taken:
            self.ready_to_read()
            for tensor in state.values():
                tensor.zero_()
        self._moved = self._moved or not blank or param in self._taken
        self._taken.add(param)
        return state

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, one of its states) for all that was reserved."""
        return ((param, tensor) for param, (_, state) in self._places.items() for tensor in state.values())

    def ready_to_read(self) -> None:
        """Waits until copies of the last step have ended, where the host reads states in its own memory."""
        if not self.managed:
            for store in self.stores:
                store.finish()

    def holds(self, plan: Plan) -> bool:
        """Whether all states of a plan are those reserved here."""
        if plan.numbers is None:
            plan.numbers = array("q")
            for param, state in zip(plan.params, plan.states, strict=True):
                number, place = self._places.get(param, (-1, {}))
                plan.numbers.append(number if all(state.get(name) is t for name, t in place.items()) else -1)
            if -1 not in plan.numbers:
                plan.devices = {self.device}  # for the kernels, wherever their bytes lie
        return -1 not in plan.numbers

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def step(self, plan: Plan, options: Sequence[tuple[float, ...]], by: Scaling) -> None:
        """One step over the states of a plan that :meth:`holds`; waits for nothing."""
        assert plan.on_device is not None
        self._judge_now()
        self._settle()
        if self.managed and self.paged is not True and not self._sent_out:
            with _cuda_kernels.launching(self.device) as stream:
                for store in self.stores:
                    if not store.is_resident:
                        store.page_in(stream)
            plan.on_device.step(plan.table, options, by)
            return
        if self._tables is None or self._tables[0] is not plan:
            self._tables = plan, self._tables_of(plan)
        stores = [(table, self._budget_of(store)) for table, store in zip(self._tables[1], self.stores, strict=True)]
        plan.on_device.paged_step(plan.table, options, by, stores)

    def _tables_of(self, plan: Plan) -> list[StoreTable]:
        assert plan.numbers is not None
        rows = [-1] * sum(self._sizes)
        for row, number in enumerate(plan.numbers):
            rows[number] = row
        tables, first = [], 0
        for store, size in zip(self.stores, self._sizes, strict=True):
            tables.append(StoreTable(self.module, store, rows[first : first + size], self.device))
            first += size
        return tables

    def _judge_now(self) -> None:
        if self.managed and self.paged == "auto" and not self._is_capturing():
            free = self.free()
            out = self.states_paged_out()
            move = self._judge.judge(time.monotonic(), free, self.states_in_memory(), out)
            if move == "in" and _cuda_kernels.memory(self.device)[0] < free.margin + out:
                return  # there is room, but torch's allocator keeps it
            if move is not None:
                self._sent_out = move == "out"
            elif out == 0 and free.bytes >= free.margin:
                self._sent_out = False  # so little that it was never out

    def _settle(self) -> None:
        if self._moved:
            with _cuda_kernels.launching(self.device) as stream:
                for store in self.stores:
                    store.page_out(stream)
                    store.forget_residency()
            self._moved = False

    def _budget_of(self, store: Any) -> int:
        """Bytes of the device that a store may take in a step."""
        if self.paged is not True and not self._sent_out:
            return int(store.num_bytes)
        share = max(1, len(self.stores))
        if self.budget is not None:
            return max(int(store.largest_chunk), self.budget // share) if share > 1 else self.budget
        least = CHUNKS_AT_ONCE * int(store.largest_chunk)
        # Under "auto" somebody else needs what is free.
        return max(least, self.free().bytes // 2 // share) if self.paged is True else least

    def free(self) -> Free:
        return free_device_memory(self.device)

    # -----------------------------------------------------------------------------------------------------------------
    # Moves; the caller sees to it that there is one at a time

    def keep_within_budget(self) -> None:
        """Steps that go over the states with torch's operations move nothing here."""

    def page_out(self) -> None:
        """Sends all states to the host, and returns when they are there; "auto" then pages until there is room. Those
        in pinned memory are always there."""
        if not self.managed:
            return
        self._sent_out = True
        with _cuda_kernels.launching(self.device) as stream:
            for store in self.stores:
                store.page_out(stream)
        self._judge_now()

    def page_in(self) -> None:
        """Has the next step bring back what "auto" sent out."""
        self._sent_out = False

    # -----------------------------------------------------------------------------------------------------------------
    # What is where

    def state_bytes(self) -> int:
        return sum(store.num_bytes for store in self.stores)

    def states_paged_out(self) -> int:
        """Bytes of states on the host, by what was asked for."""
        return self.state_bytes() - self._resident()

    def states_in_memory(self) -> int:
        """Bytes of states on the device."""
        return self._resident()

    def _resident(self) -> int:
        return sum(store.statistics[0] for store in self.stores)

    def statistics(self) -> PagingStatistics:
        """No stalls: the host waits for nothing, and what the device waits for is not measured."""
        told = [store.statistics for store in self.stores]
        return {
            "state_bytes": self.state_bytes(),
            "resident_bytes": self._resident(),
            "paged_out_bytes": self.states_paged_out(),
            "bytes_in": sum(bytes_in for _, bytes_in, _ in told),
            "bytes_out": sum(bytes_out for _, _, bytes_out in told),
            "stalls": 0,
            "stall_seconds": 0.0,
        }
