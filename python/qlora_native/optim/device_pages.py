"""Arenas for the states of an optimizer on a CUDA device, when they may leave its memory.

On a device with concurrent managed access (Linux) in managed memory, whose pages move between device and host under one
address. Elsewhere (Windows, WSL2, Tegra) in pinned host memory, from which each chunk is copied to the device for its
update: with ``paged=True`` from the start, with "auto" from the first time on that memory runs short.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qlora_native._memory import device_memory, free_device_memory
from qlora_native.errors import say_once
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._cuda_optim import Scaling, StoreTable
from qlora_native.ops._optim import StepTable
from qlora_native.optim.paging import Pages, State, Wanted, is_coded
from qlora_native.optim.pressure import PagingPolicy

CHUNK_BYTES = 32 << 20  # at most: the bus streams, and a few chunks are little beside a model
CHUNKS = 16  # at least, of an arena or of a budget, as far as tensors can be split so fine
ASK_AGAIN = 16  # steps; asking for a chunk that is there takes the driver some microseconds
CHUNKS_AT_ONCE = 3  # one that comes, one that is updated, one that goes
TYPE_CODES = {torch.float32: "<f4", torch.int8: "|i1", torch.uint8: "|u1"}


@dataclass(eq=False)
class DevicePages(Pages):
    """The arenas of one optimizer on one device; ``budget`` is bytes of the device. The caller moves one at a time."""

    device: torch.device
    module: ModuleType

    def __post_init__(self) -> None:
        self.managed: bool = self.module.has_concurrent_managed_access(self.device.index or 0)
        self.is_out = self.paged is True  # "auto" too is under pressure, or page_out was asked for
        self._policy = PagingPolicy()
        self._resident_steps = 0
        # What belongs to the table that stepped last.
        self._tables: tuple[StepTable, list[StoreTable]] | None = None
        self.could_pin = not self.managed
        if self.could_pin and self.is_out:
            self.pin({})

    def pin(self, states: Mapping[Tensor, State]) -> None:
        """Move states that are ordinary tensors of the device into pinned host memory, for good, as all to come."""
        self.could_pin = False
        say_once(
            f"qlora_native: managed memory of {self.device} does not move while kernels run (as on Windows, WSL2 and "
            f"Tegra): {self.owner}'s paged states are in pinned host memory, and every step copies all of them."
        )
        if states:
            self.reserve([(param, is_coded(state)) for param, state in states.items()])
        for param, state in states.items():
            place = self.take(param, blank=False)
            for name, tensor in place.items():
                tensor.copy_(state[name])
            state.update(place)

    def is_short(self) -> bool:
        """Whether less of the device than the margin is free; False while a graph is captured."""
        free = free_device_memory(self.device)
        return free.bytes < free.margin and not _cuda_kernels.is_capturing(self.device)

    def reserve(self, wanted: Wanted) -> None:
        """Make room for the states of these parameters, all 0, in one arena more, but for those that ``could_pin``."""
        if self.could_pin:
            return
        forms = self._forms(wanted)
        arena_bytes = sum(numel * moments * (1 if coded else 4) for numel, moments, coded in forms)
        chunk_bytes = min(CHUNK_BYTES, min(arena_bytes, self.budget or arena_bytes) // CHUNKS)
        try:
            with _cuda_kernels.launching(self.device) as stream:
                if self.managed:
                    store = self.module.ManagedStore(
                        forms, self.module.managed_page_bytes, chunk_bytes
                    )
                else:
                    store = self.module.PinnedStore(forms, self.module.pinned_page_bytes, chunk_bytes)
                store.zero(self._budget_of(store), stream)
        except RuntimeError as error:
            if self.paged is True or not self.managed:
                advice = "Use bits=8, which takes a quarter, or paged=False."
                raise RuntimeError(f"{error} {advice}") from None
            say_once(
                f"qlora_native: {self.owner}'s states stay in ordinary memory of {self.device}. {error}"
            )
            self.managed = bool(self.stores)  # those before stay what they are
            self.could_pin = not self.managed
            return
        self._add(store, wanted, store.places)
        self._tables = None

    def _view(self, store: Any, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not self.managed or self.device.type != "cuda":
            return super()._view(store, offset, shape, dtype)
        data = store.address + offset, False
        interface = {
            "shape": (shape.numel(),),
            "typestr": TYPE_CODES[dtype],
            "data": data,
            "version": 3,
        }
        # Torch's tensor keeps this object, and so the store, alive.
        place = SimpleNamespace(store=store, __cuda_array_interface__=interface)
        return torch.as_tensor(place, device=self.device).view(shape)

    def wait_until_readable(self) -> None:
        if not self.managed:
            for store in self.stores:
                store.finish()

    def holds(self, table: StepTable) -> bool:
        """Whether all states of a table are those reserved here."""
        if -1 in self.numbers(table):
            return False
        table.devices = {self.device}  # for the kernels, wherever their bytes lie
        return True

    def step(self, table: StepTable, options: Sequence[tuple[float, ...]], by: Scaling) -> None:
        """One step over the states of a table that :meth:`holds`; waits for nothing.

        RuntimeError in the capture of a CUDA graph, unless all states are on the device and stay there.
        """
        assert table.on_device is not None
        is_capturing = _cuda_kernels.is_capturing(self.device)
        if not is_capturing:
            self._apply_policy()
        stays = self.managed and not self.is_out
        if is_capturing and not (
            stays and not self.moved and all(store.is_resident for store in self.stores)
        ):
            raise RuntimeError(
                f"{self.owner}: its paged states move between host and device in a step, and wait for what moved in "
                "the step before, which a CUDA graph cannot hold: use paged=False, or capture all but step()."
            )
        with _cuda_kernels.launching(self.device) as stream:
            if self.moved:
                self.moved = False
                for store in self.stores:
                    store.page_out(stream)
                    store.forget_residency()
            if stays:
                self._bring_back(stream, is_capturing)
        if stays:
            table.on_device.step(table.rows, options, by)
            return
        if self._tables is None or self._tables[0] is not table:
            self._tables = table, self._tables_of(table)
        stores = [
            (rows, self._budget_of(store))
            for rows, store in zip(self._tables[1], self.stores, strict=True)
        ]
        table.on_device.step(table.rows, options, by, stores)

    def _bring_back(self, stream: int, is_capturing: bool) -> None:
        """Have all states on the device, in the order of the stream.

        Those that an allocation evicted look as if they were there, because CUDA does not report where managed pages
        are; kernels would read them over the bus in every step. So now and then all are asked for again, which moves
        only what has gone.
        """
        self._resident_steps += 1
        again = self._resident_steps % ASK_AGAIN == 0 and not is_capturing
        for store in self.stores:
            if not store.is_resident:
                store.page_in(stream)
            elif again:
                store.renew(stream)

    def _tables_of(self, table: StepTable) -> list[StoreTable]:
        rows = {number: row for row, number in enumerate(self.numbers(table))}
        numbers = count()
        return [
            StoreTable(
                self.module,
                store,
                [rows.get(n, -1) for n in islice(numbers, len(store.places))],
                self.device,
            )
            for store in self.stores
        ]

    def _apply_policy(self) -> None:
        if not self.managed or self.paged != "auto":
            return
        free, out = free_device_memory(self.device), self.states_paged_out()
        move = self._policy.decide(time.monotonic(), free, self.states_in_memory(), out)
        if move == "in" and device_memory(self.device)[0] < free.margin + out:
            return  # there is room, but torch's allocator keeps it
        # So little is short that it was never out, where nothing is.
        if move is not None or (out == 0 and free.bytes >= free.margin):
            self.is_out = move == "out"

    def _budget_of(self, store: Any) -> int:
        """Bytes of the device that a store may take in a step."""
        if not self.is_out:
            return int(store.num_bytes)
        share = max(1, len(self.stores))
        if self.budget is not None:
            return max(int(store.largest_chunk), self.budget // share) if share > 1 else self.budget
        least = CHUNKS_AT_ONCE * int(store.largest_chunk)
        # Under "auto" another program needs what is free.
        return (
            max(least, free_device_memory(self.device).bytes // 2 // share)
            if self.paged is True
            else least
        )

    def page_out(self) -> None:
        """Send all states to the host, and return when they are there; "auto" then pages until there is room. Those in
        pinned memory are always there."""
        if not self.managed:
            return
        self.is_out = True
        with _cuda_kernels.launching(self.device) as stream:
            for store in self.stores:
                store.page_out(stream)
        self._apply_policy()

    def page_in(self) -> None:
        """Let the next step bring back what "auto" sent out."""
        self.is_out = self.paged is True

    def states_paged_out(self) -> int:
        """Bytes of states on the host, going by the moves that were issued."""
        return self.state_bytes() - self.states_in_memory()

    def states_in_memory(self) -> int:
        """Bytes of states on the device."""
        return sum(store.statistics[0] for store in self.stores)

    def statistics(self) -> tuple[float, ...]:
        """The values of :class:`PagingStatistics`; no stalls: the host waits for nothing, and what the device waits for
        is not measured."""
        moved = (sum(store.statistics[way] for store in self.stores) for way in (1, 2))
        return self.state_bytes(), self.states_in_memory(), self.states_paged_out(), *moved, 0, 0.0
