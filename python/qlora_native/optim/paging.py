"""What an optimizer has of paging: its options, its arenas, and the moves that others may ask for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native._memory import free_memory
from qlora_native.ops import _cuda_kernels
from qlora_native.optim.device_pages import DevicePages
from qlora_native.optim.pages import LEAST_BUDGET, HostPages, Paged, PagingStatistics
from qlora_native.optim.pressure import watch

PAGING_DEFAULTS: dict[str, Any] = {"paged": "auto", "page_dir": None, "page_budget": None}
LEAST_WATCHED = 1 << 20  # bytes of states; fewer are not worth a thread


class PagedStates:
    """The part of an optimizer that knows where its states lie. One lock keeps steps and moves apart."""

    _moments: ClassVar[dict[str, torch.dtype]]  # name of a state -> dtype of its codes

    state: Any  # torch's
    paged: Paged
    page_dir: Path | None
    page_budget: int | None

    def _set_paging(self, paged: Paged, page_dir: str | Path | None, page_budget: int | None) -> None:
        name = type(self).__name__
        if paged not in (True, False, "auto"):
            raise ValueError(f"{name}: paged is {paged!r}: expected 'auto', True or False.")
        if page_budget is not None and page_budget < LEAST_BUDGET:
            raise ValueError(
                f"{name}: page_budget is {page_budget}: expected at least {LEAST_BUDGET} bytes, or None for what the "
                "free memory allows."
            )
        self.paged, self.page_dir, self.page_budget = paged, None if page_dir is None else Path(page_dir), page_budget
        self._reset_paging()

    def _reset_paging(self) -> None:
        self._pages: dict[torch.device, HostPages | DevicePages] = {}
        self._lock, self._process = threading.RLock(), os.getpid()

    def _alone(self) -> threading.RLock:
        """The lock of this process: one that a fork left locked would stay so."""
        if self._process != os.getpid():
            self._lock, self._process = threading.RLock(), os.getpid()
        return self._lock

    # -----------------------------------------------------------------------------------------------------------------
    # Places

    def _reserve(self, wanted: Iterable[tuple[Tensor, bool]]) -> None:
        """Makes places for the states of these parameters, coded or not, in one arena a device; where they have one of
        that form already, nothing happens."""
        if self.paged is False:
            return
        missing: dict[torch.device, list[tuple[Tensor, bool]]] = {}
        for param, coded in wanted:
            if not self._has_place(param, coded):
                missing.setdefault(param.device, []).append((param, coded))
        for device, chosen in missing.items():
            pages = self._pages.get(device) or self._new_pages(device)
            if pages is None:
                continue
            before = pages.state_bytes()
            pages.reserve(*zip(*chosen, strict=True))
            self._pages[device] = pages
            watched = self.paged == "auto" and isinstance(pages, HostPages)  # on a device, every step looks
            if watched and before < LEAST_WATCHED <= pages.state_bytes():
                watch(self, free_memory)

    def _new_pages(self, device: torch.device) -> HostPages | DevicePages | None:
        """None for devices that have no page store: their states are ordinary tensors."""
        name, module = type(self).__name__, _cuda_kernels.module_for(device)
        if module is not None:
            return DevicePages(name, self._moments, self.paged, self.page_budget, device, module)
        if device.type == "cpu":
            return HostPages(name, self._moments, self.paged, self.page_dir, self.page_budget)
        if self.paged is True:
            raise ValueError(
                f"{name}: paged is True, but states on {device} cannot be paged by this build: leave paged at 'auto', "
                "or move the parameters to the CPU."
            )
        return None

    def _has_place(self, param: Tensor, coded: bool) -> bool:
        place = self._pages[param.device].place_of(param) if param.device in self._pages else None
        return place is not None and ("exp_avg_absmax" in place) == coded

    def _take(self, param: Tensor, coded: bool, blank: bool) -> dict[str, Tensor] | None:
        """The states that were reserved in this form, zeros if ``blank``, else whatever they hold; None if there are
        none."""
        return self._pages[param.device].take(param, blank) if self._has_place(param, coded) else None

    def _apart(self, loaded: list[tuple[Tensor, Any, dict[str, Any]]]) -> list[tuple[Tensor, Any, dict[str, Any]]]:
        """Loaded states of (parameter, group, state); copies of those that stand in another parameter's place, where
        they would be overwritten before they are read."""
        owner = {t.data_ptr(): param for pages in self._pages.values() for param, t in pages.tensors()}
        return [
            (
                param,
                group,
                {
                    key: value.clone()
                    if isinstance(value, Tensor) and owner.get(value.data_ptr(), param) is not param
                    else value
                    for key, value in given.items()
                },
            )
            for param, group, given in loaded
        ]

    def _ready_to_read(self) -> None:
        """Waits for states that are still on their way into the host's memory."""
        for pages in self._pages.values():
            if isinstance(pages, DevicePages):
                pages.ready_to_read()

    def _keep_within_budget(self) -> None:
        for pages in self._pages.values():
            pages.keep_within_budget()

    # -----------------------------------------------------------------------------------------------------------------
    # Moves

    def page_out(self) -> None:
        """Sends all states out of memory, into the page file. Nothing happens with ``paged=False``; with "auto", if the
        file cannot be had, a warning says so, once, and the states stay. The values are the same wherever they are."""
        with self._alone():
            for pages in self._pages.values():
                if isinstance(pages, DevicePages) and pages.could_pin:
                    self._pin(pages)
                pages.page_out()

    def _pin(self, pages: DevicePages) -> None:
        """Moves states that are ordinary tensors of a device into pinned host memory, for good."""
        pages.use_pinned_memory()
        found = [(param, state) for param, state in self.state.items() if state and param.device == pages.device]
        if found:
            pages.reserve([param for param, _ in found], ["exp_avg_absmax" in state for _, state in found])
        for param, state in found:
            place = pages.take(param, blank=False)
            for name, tensor in place.items():
                tensor.copy_(state[name])
            state.update(place)

    def page_in(self) -> None:
        """Brings states that "auto" sent out back into ordinary memory, as far as there is room."""
        with self._alone():
            for pages in self._pages.values():
                pages.page_in()

    def states_in_memory(self) -> int:
        """Bytes of states in ordinary memory that ``page_out`` would free; 0 if there is no page file to be had."""
        total = sum(pages.states_in_memory() for pages in list(self._pages.values()))
        for device, pages in list(self._pages.items()):
            if isinstance(pages, DevicePages) and pages.could_pin:
                states = [state for param, state in list(self.state.items()) if param.device == device]
                total += sum(t.nbytes for state in states for name, t in state.items() if name != "step")
        return total

    def states_paged_out(self) -> int:
        """Bytes of states in the page file; some may be resident."""
        return sum(pages.states_paged_out() for pages in list(self._pages.values()))

    def paging_statistics(self) -> PagingStatistics:
        """What is where, what was moved and what it cost, since the optimizer was made. From any thread, also while a
        step runs."""
        total = PagingStatistics(
            state_bytes=0,
            resident_bytes=0,
            paged_out_bytes=0,
            bytes_in=0,
            bytes_out=0,
            stalls=0,
            stall_seconds=0.0,
        )
        for pages in list(self._pages.values()):
            for key, value in pages.statistics().items():
                total[key] += value  # type: ignore[literal-required]
        return total

    def _paging_options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in PAGING_DEFAULTS}
