"""Arenas for the states of an optimizer on a CUDA device, when they may leave its memory.

On a device with concurrent managed access (Linux) in managed memory, whose pages move between device and host under one
address. Elsewhere (Windows, WSL2, Tegra) in pinned host memory, from which each chunk is copied to the device for its
update: with ``paged=True`` from the start, with "auto" from the first time on that memory runs short.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qlora_native._memory import device_memory, free_device_memory
from qlora_native.errors import say_once
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._cuda_optim import Scaling, StoreTable
from qlora_native.ops._optim import Plan
from qlora_native.optim.paging import Moments, Paged, Pages, PagingStatistics, State, Wanted
from qlora_native.optim.pressure import PagingPolicy

CHUNK_BYTES = 32 << 20  # at most: the bus streams, and a few chunks are little beside a model
CHUNKS = 16  # at least, of an arena or of a budget, as far as tensors can be split so fine
ASK_AGAIN = 16  # steps; asking for a chunk that is there takes the driver some microseconds
CHUNKS_AT_ONCE = 3  # one that comes, one that is updated, one that goes
TYPE_CODES = {torch.float32: "<f4", torch.int8: "|i1", torch.uint8: "|u1"}


class DevicePages(Pages):
    """The arenas of one optimizer on one device; ``budget`` is bytes of the device. The caller moves one at a time."""

    def __init__(
        self, owner: str, moments: Moments, paged: Paged, budget: int | None, device: torch.device, module: ModuleType
    ) -> None:
        super().__init__(owner, moments, paged, budget)
        self.device = device
        self.module = module
        self.managed: bool = module.has_concurrent_managed_access(device.index or 0)
        self.could_pin = not self.managed
        if self.could_pin and paged is True:
            self.use_pinned_memory()
        self._policy = PagingPolicy()
        self._sent_out = False  # "auto" is under pressure, or page_out was asked for
        self._resident_steps = 0
        self._moved = False  # the host wrote states, which may have moved their pages
        self._tables: tuple[Plan, list[StoreTable]] | None = None  # of the plan that stepped last

    def use_pinned_memory(self) -> None:
        """From now on reserve states in pinned host memory; warns once."""
        self.could_pin = False
        say_once(
            f"qlora_native: managed memory of {self.device} does not move while kernels run (as on Windows, WSL2 and "
            f"Tegra): {self.owner}'s paged states are in pinned host memory, and every step copies all of them."
        )

    def is_short(self) -> bool:
        """Whether less of the device than the margin is free; False while a graph is captured."""
        free = free_device_memory(self.device)
        return free.bytes < free.margin and not _cuda_kernels.is_capturing(self.device)

    def reserve(self, wanted: Wanted) -> None:
        """Nothing where the states ``could_pin``."""
        if self.could_pin:
            return
        forms = self._forms(wanted)
        arena_bytes = sum(numel * count * (1 if coded else 4) for numel, count, coded in forms)
        chunk_bytes = min(CHUNK_BYTES, min(arena_bytes, self.budget or arena_bytes) // CHUNKS)
        with _cuda_kernels.launching(self.device) as stream:
            if self.managed:
                store = self.module.ManagedStore(forms, self.module.managed_page_bytes, chunk_bytes)
                store.zero(self._budget_of(store), stream)
            else:
                store = self.module.PinnedStore(forms, self.module.pinned_page_bytes, chunk_bytes)
        self._add(store, wanted, store.places)
        self._tables = None

    def _view(self, store: Any, offsets: Sequence[int], i: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not (self.managed and self.device.type == "cuda"):
            return super()._view(store, offsets, i, shape, dtype)
        if shape.numel() == 0:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        data = store.address + offsets[i], False
        interface = {"shape": (shape.numel(),), "typestr": TYPE_CODES[dtype], "data": data, "version": 3}
        place = SimpleNamespace(store=store, __cuda_array_interface__=interface)  # keeps the store alive
        return torch.as_tensor(place, device=self.device).view(shape)

    def take(self, param: Tensor, blank: bool) -> State:
        was_taken = param in self._taken
        if blank and was_taken:
            self.wait_until_readable()
        self._moved = self._moved or not blank or was_taken
        return super().take(param, blank)

    def wait_until_readable(self) -> None:
        if not self.managed:
            for store in self.stores:
                store.finish()

    def holds(self, plan: Plan) -> bool:
        """Whether all states of a plan are those reserved here."""
        if -1 in self.numbers(plan):
            return False
        plan.devices = {self.device}  # for the kernels, wherever their bytes lie
        return True

    def step(self, plan: Plan, options: Sequence[tuple[float, ...]], by: Scaling) -> None:
        """One step over the states of a plan that :meth:`holds`; waits for nothing.

        RuntimeError in the capture of a CUDA graph, unless all states are on the device and stay there.
        """
        assert plan.on_device is not None
        self._apply_policy()
        if _cuda_kernels.is_capturing(self.device):
            self._check_that_nothing_moves()
        if self._moved:
            with _cuda_kernels.launching(self.device) as stream:
                for store in self.stores:
                    store.page_out(stream)
                    store.forget_residency()
            self._moved = False
        if self.managed and self.paged is not True and not self._sent_out:
            self._bring_back()
            plan.on_device.step(plan.table, options, by)
            return
        if self._tables is None or self._tables[0] is not plan:
            self._tables = plan, self._tables_of(plan)
        stores = [(table, self._budget_of(store)) for table, store in zip(self._tables[1], self.stores, strict=True)]
        plan.on_device.step(plan.table, options, by, stores)

    def _bring_back(self) -> None:
        """Have all states on the device, in the order of the current stream.

        Those that an allocation evicted look as if they were there, because CUDA does not report where managed pages
        are; kernels would read them over the bus in every step. So now and then all are asked for again, which moves
        only what has gone.
        """
        self._resident_steps += 1
        again = self._resident_steps % ASK_AGAIN == 0 and not _cuda_kernels.is_capturing(self.device)
        with _cuda_kernels.launching(self.device) as stream:
            for store in self.stores:
                if not store.is_resident:
                    store.page_in(stream)
                elif again:
                    store.renew(stream)

    def _check_that_nothing_moves(self) -> None:
        stay = self.managed and self.paged is not True and not self._sent_out and not self._moved
        if not (stay and all(store.is_resident for store in self.stores)):
            raise RuntimeError(
                f"{self.owner}: its paged states move between host and device in a step, and wait for what moved in "
                "the step before, which a CUDA graph cannot hold: use paged=False, or capture all but step()."
            )

    def _tables_of(self, plan: Plan) -> list[StoreTable]:
        rows = [-1] * self._num_places
        for row, number in enumerate(self.numbers(plan)):
            rows[number] = row
        tables = []
        first = 0
        for store in self.stores:
            last = first + len(store.places)
            tables.append(StoreTable(self.module, store, rows[first:last], self.device))
            first = last
        return tables

    def _apply_policy(self) -> None:
        if self.managed and self.paged == "auto" and not _cuda_kernels.is_capturing(self.device):
            free = free_device_memory(self.device)
            out = self.states_paged_out()
            move = self._policy.decide(time.monotonic(), free, self.states_in_memory(), out)
            if move == "in" and device_memory(self.device)[0] < free.margin + out:
                return  # there is room, but torch's allocator keeps it
            if move is not None:
                self._sent_out = move == "out"
            elif out == 0 and free.bytes >= free.margin:
                self._sent_out = False  # so little that it was never out

    def _budget_of(self, store: Any) -> int:
        """Bytes of the device that a store may take in a step."""
        if self.paged is not True and not self._sent_out:
            return int(store.num_bytes)
        share = max(1, len(self.stores))
        if self.budget is not None:
            return max(int(store.largest_chunk), self.budget // share) if share > 1 else self.budget
        least = CHUNKS_AT_ONCE * int(store.largest_chunk)
        # Under "auto" another program needs what is free.
        return max(least, free_device_memory(self.device).bytes // 2 // share) if self.paged is True else least

    def page_out(self) -> None:
        """Send all states to the host, and return when they are there; "auto" then pages until there is room. Those in
        pinned memory are always there."""
        if not self.managed:
            return
        self._sent_out = True
        with _cuda_kernels.launching(self.device) as stream:
            for store in self.stores:
                store.page_out(stream)
        self._apply_policy()

    def page_in(self) -> None:
        """Let the next step bring back what "auto" sent out."""
        self._sent_out = False

    def states_paged_out(self) -> int:
        """Bytes of states on the host, going by the moves that were issued."""
        return self.state_bytes() - self.states_in_memory()

    def states_in_memory(self) -> int:
        """Bytes of states on the device."""
        return sum(store.statistics[0] for store in self.stores)

    def statistics(self) -> PagingStatistics:
        """No stalls: the host waits for nothing, and what the device waits for is not measured."""
        moved = [store.statistics[1:] for store in self.stores]
        return self._statistics(self.states_in_memory(), self.states_paged_out(), moved)
