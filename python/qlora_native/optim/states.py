"""An optimizer's states: where they lie, and how they enter and leave checkpoints.

Parameters may be sharded over ranks (DTensors, as FSDP2 makes them): each rank has the states of its own part, and
``state_dict`` those of the whole parameter.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _native, reference
from qlora_native._buffers import BLOCKS
from qlora_native.ops import _library
from qlora_native.ops._operands import is_sharded, part_of
from qlora_native.ops._optim import STATES, StepTable
from qlora_native.optim import paging, pressure
from qlora_native.optim.paging import (
    HostPages,
    Moments,
    Paged,
    Pages,
    PagingStatistics,
    is_coded,
    state_forms,
)

MIN_CODED_NUMEL = 4096  # smaller tensors keep 32-bit states under bits=8
LEAST_WATCHED = 1 << 20  # bytes of states; fewer are not worth a thread
OPTIONS = ("paged", "page_dir", "page_budget", "max_norm")


class PagedOptimizer(torch.optim.Optimizer):
    """An optimizer whose states may leave memory. Steps and moves of states take turns: each is done within
    :meth:`_alone`."""

    _moments: ClassVar[Moments]
    _tensors: ClassVar[tuple[str, ...]] = STATES  # of a parameter, in the order of the op's arguments
    _table: StepTable | None = None  # of the last step

    def __init__(self, params: Any, defaults: dict[str, Any], *options: Any) -> None:
        self._set_options(*options)
        super().__init__(params, defaults)
        # Fail here, not in the first step, if there is no room for the page file.
        if self.paged is True:
            self._reserve()

    def _set_options(
        self,
        paged: Paged,
        page_dir: str | Path | None,
        page_budget: int | None,
        max_norm: float | None,
    ) -> None:
        name = type(self).__name__
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{name}: max_norm is {max_norm}: expected a number above 0, or None.")
        if paged not in (True, False, "auto"):
            raise ValueError(f"{name}: paged is {paged!r}: expected 'auto', True or False.")
        if page_budget is not None and page_budget < paging.LEAST_BUDGET:
            raise ValueError(
                f"{name}: page_budget is {page_budget}: expected at least {paging.LEAST_BUDGET} bytes, or None for "
                "what the free memory allows."
            )
        self.paged = paged
        self.page_dir = None if page_dir is None else Path(page_dir)
        self.page_budget = page_budget
        self.max_norm = max_norm
        self._pages: dict[torch.device, Any] = {}  # a Pages for each device that has a page store
        self._lock = threading.RLock()
        self._process = os.getpid()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ValueError for options and dtypes that are not supported."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            # torch's constructor comes here before ours has reserved any.
            if self.paged is True and self._pages:
                self._reserve()
        except (ValueError, OSError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        are_betas = len(group["betas"]) == 2 and all(0 <= float(beta) < 1 for beta in group["betas"])
        are_numbers = {
            key: 0 <= float(group.get(key, 0)) < math.inf for key in ("lr", "eps", "weight_decay")
        }
        checks = {
            "bits": (group["bits"] in (8, 32), "32 or 8"),
            "betas": (are_betas, "two numbers from 0 up to, not including, 1"),
            **{key: (is_number, "0 or more, and finite") for key, is_number in are_numbers.items()},
            **{
                key: (not group.get(key), "False, since it is not offered")
                for key in ("amsgrad", "maximize")
            },
        }
        for key, (is_right, expected) in checks.items():
            if not is_right:
                raise ValueError(f"{name}: {key} is {group[key]}: expected {expected}.")
        for param in group["params"]:
            if param.dtype not in _native.DTYPE_NUMBER:
                raise ValueError(
                    f"{name}: a parameter {list(param.shape)} is {param.dtype}: expected float32, bfloat16 or float16."
                )

    def _alone(self) -> threading.RLock:
        """The lock of this process: one that a fork left locked would stay so."""
        if self._process != os.getpid():
            self._lock = threading.RLock()
            self._process = os.getpid()
        return self._lock

    def _placed(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its group."""
        return [(param, group) for group in self.param_groups for param in group["params"]]

    def _is_coded(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["bits"] == 8) and param.numel() >= MIN_CODED_NUMEL

    def _reserve(self) -> None:
        """Make places for states that may leave memory and have none, in one arena more a device."""
        if self.paged is False:
            return
        missing: dict[torch.device, list[tuple[Tensor, bool]]] = {}
        for param, group in self._placed():
            coded = self._is_coded(param, group)
            if param.is_floating_point() and not self._has_place(param, coded):
                missing.setdefault(param.device, []).append((param, coded))
        for device, chosen in missing.items():
            pages: Pages | None = self._pages.get(device) or self._new_pages(device)
            if pages is None:
                continue
            before = pages.state_bytes()
            BLOCKS.release()  # states come to stay, and what is kept for later makes room
            pages.reserve(chosen)
            self._pages[device] = pages
            grew = before < LEAST_WATCHED <= pages.state_bytes()
            # States on a device need no watch: every step looks.
            if grew and self.paged == "auto" and isinstance(pages, HostPages):
                pressure.watch(self, paging.free_memory)

    def _new_pages(self, device: torch.device) -> Pages | None:
        """None for devices that have no page store: their states are ordinary tensors."""
        options = type(self).__name__, self._moments, self.paged, self.page_dir, self.page_budget
        module = _library.module_for(device)
        if module is not None:
            from qlora_native.optim.device_pages import DevicePages

            return DevicePages(*options, device, module)
        if device.type == "cpu":
            return HostPages(*options)
        if self.paged is True:
            raise ValueError(
                f"{type(self).__name__}: paged is True, but states on {device} cannot be paged by this build: leave "
                "paged at 'auto', or move the parameters to the CPU."
            )
        return None

    def _has_place(self, param: Tensor, coded: bool) -> bool:
        """Whether states of this form were reserved for the parameter."""
        pages = self._pages.get(param.device)
        return (
            pages is not None and param in pages.places and is_coded(pages.places[param][1]) == coded
        )

    def _new_state(self, param: Tensor, group: dict[str, Any], blank: bool = True) -> dict[str, Any]:
        """The states of a parameter, zeros if ``blank``; where they have a place reserved, there."""
        coded, device = self._is_coded(param, group), param.device
        if self._has_place(param, coded):
            state = self._pages[device].take(param, blank)
        else:
            forms = state_forms(self._moments, param, coded).items()
            state = {
                name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in forms
            }
        step = (
            {"step": torch.zeros((), dtype=torch.float32, device=device)}
            if "step" in self._tensors
            else {}
        )
        return {**step, **state}

    def _pinnable(self, pages: Any) -> dict[Tensor, dict[str, Any]]:
        """The states that are ordinary tensors of a device, and may move into pinned host memory."""
        states = list(self.state.items()) if pages.could_pin else []
        return {param: state for param, state in states if state and param.device == pages.device}

    def page_out(self) -> None:
        """Sends all states out of memory, into the page file. Nothing happens with ``paged=False``; with "auto", if the
        file cannot be had, a warning says so, once, and the states stay. The values are the same wherever they are."""
        with self._alone():
            for pages in self._pages.values():
                if pages.could_pin:
                    pages.pin(self._pinnable(pages))
                pages.page_out()

    def page_in(self) -> None:
        """Brings states that "auto" sent out back into ordinary memory, as far as there is room."""
        with self._alone():
            for pages in self._pages.values():
                pages.page_in()

    def states_in_memory(self) -> int:
        """Bytes of states in ordinary memory that ``page_out`` would free; 0 if there is no page file to be had."""
        found = list(self._pages.values())
        plain = [state for pages in found for state in self._pinnable(pages).values()]
        plain_bytes = sum(
            tensor.nbytes for state in plain for name, tensor in state.items() if name != "step"
        )
        return plain_bytes + sum(pages.states_in_memory() for pages in found)

    def states_paged_out(self) -> int:
        """Bytes of states in the page file; some may be resident."""
        return sum(pages.states_paged_out() for pages in list(self._pages.values()))

    def paging_statistics(self) -> PagingStatistics:
        """What is where, what was moved and what it cost, since the optimizer was made. From any thread, also while a
        step runs."""
        names = PagingStatistics.__annotations__
        values = [(0,) * len(names), *(pages.statistics() for pages in list(self._pages.values()))]
        return dict(zip(names, map(sum, zip(*values, strict=True)), strict=True))  # type: ignore[return-value]

    def _wait_until_readable(self) -> None:
        for pages in self._pages.values():
            pages.wait_until_readable()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Its tensors are the states themselves: copy them to keep them from the next step. Those of
        sharded parameters are fp32 DTensors, which any number of ranks can load."""
        with self._alone():
            self._wait_until_readable()
            result = super().state_dict()
            for number, (param, _) in enumerate(self._placed()):
                if is_sharded(param) and self.state.get(param):
                    result["state"][number] = whole_states(param, self.state[param])
            return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtype, are copied, and take the form that the group's ``bits`` asks for:
        a checkpoint of ``torch.optim.AdamW`` or of the other number of bits can be continued. ValueError for states
        that do not fit."""
        given: dict[str, Any] = {}

        def hold(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            given.update(state_dict)
            for group in state_dict["param_groups"]:
                self._check_group({**self.defaults, **group, "params": []})
            return {**state_dict, "state": {}}  # torch would cast what it is given

        def fit(_: Any) -> None:
            numbers = chain.from_iterable(group["params"] for group in given["param_groups"])
            placed = zip(numbers, self._placed(), strict=True)
            states = given["state"]
            self._fit(
                {param: self._checked(param, states[n]) for n, (param, _) in placed if n in states}
            )

        with (
            self.register_load_state_dict_pre_hook(hold),
            self.register_load_state_dict_post_hook(fit, prepend=True),
            self._alone(),
        ):
            super().load_state_dict(state_dict)

    def _checked(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's parts of a loaded state; ValueError if it is not one of this optimizer."""
        if is_sharded(param) and not any(
            isinstance(value, Tensor) and is_sharded(value) for value in state.values()
        ):
            state = sharded_states(param, state)
        given = {
            name: part_of(value) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        forms = state_forms(self._moments, param, is_coded(given))
        wrong: dict[str, str] = {}
        for name, (shape, dtype) in forms.items():
            value = given.get(name)
            dtypes = _native.DTYPE_NUMBER if dtype.is_floating_point else (dtype,)
            is_dense = (
                isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
            )
            if value is None or not is_dense or value.shape != shape or value.dtype not in dtypes:
                found = (
                    f"{value.dtype} {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                wrong[name] = f"is {found}: expected {dtype} {list(shape)}, dense and with values"
            elif not reference.is_finite(value):
                wrong[name] = "holds a NaN or an infinity: expected finite numbers"
            elif self._moments.get(name) != torch.int8 and value.numel() and value.min() < 0:
                wrong[name] = f"holds {float(value.min()):g}: expected 0 or more"
        if "step" in self._tensors:
            forms["step"] = torch.Size(), torch.float32
            step = float(given.get("step", math.nan))
            if not (step.is_integer() and 0 <= step < 1 << 31):
                wrong["step"] = f"is {step}: expected a whole number from 0 up to, not including, 2^31"
        for name, text in wrong.items():
            raise ValueError(
                f"{type(self).__name__}: {name} of a parameter {list(param.shape)} {text}."
            )
        return {name: given[name] for name in forms}

    def _fit(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy states into those of the parameters, in the form that each group asks for."""
        self._reserve()
        arenas = [place for pages in self._pages.values() for place in pages.places.items()]
        owners = {
            tensor.data_ptr(): param for param, (_, place) in arenas for tensor in place.values()
        }
        for param, given in states.items():
            for key, value in given.items():
                if isinstance(value, Tensor) and owners.get(value.data_ptr(), param) is not param:
                    given[key] = value.clone()  # in another parameter's place it would be overwritten
        for param, group in self._placed():
            if not (given := states.get(param, {})):
                continue
            state = self._new_state(param, group, blank=False)
            for name in self._moments:
                value = given[name].detach().to(param.device)
                absmax, own_absmax = (of.get(f"{name}_absmax") for of in (given, state))
                if absmax is not None and own_absmax is None:
                    value = reference.decode_state(value, absmax.to(param.device))
                elif absmax is None and own_absmax is not None:
                    value, absmax = reference.encode_state(
                        value.float(), signed=state[name].dtype == torch.int8
                    )
                state[name].copy_(value)
                if own_absmax is not None:
                    own_absmax.copy_(absmax)
            if "step" in state:
                state["step"].fill_(float(given["step"]))
            self.state[param] = state

    def __getstate__(self) -> dict[str, Any]:
        self._wait_until_readable()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OPTIONS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._table = None
        for group in self.param_groups:
            group.update({**self.defaults, **group})
        if "defaults" in state:  # a copy or from a pickle; load_state_dict comes by here, too
            self._set_options(*(state[name] for name in OPTIONS))
            if self.state:
                self._fit(self.state)


def decoded(state: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a parameter, codes in fp32: a rank's blocks that share a scale end where its part ends, so another
    number of ranks has other blocks. Encoded again in the same blocks they are the same bytes."""
    wide = {}
    for name, value in state.items():
        absmax = state.get(f"{name}_absmax")
        if not name.endswith("_absmax"):
            wide[name] = value if absmax is None else reference.decode_state(value, absmax)
    return wide


def whole_states(param: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a sharded parameter as fp32 DTensors sharded like it."""
    from torch.distributed.tensor import DTensor

    layout = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    return {
        name: part
        if name == "step"
        else DTensor.from_local(part, param.device_mesh, param.placements, **layout)
        for name, part in decoded(state).items()
    }


def sharded_states(param: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a whole parameter, sharded like it; 8-bit ones in fp32."""
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(
            value.to(param.device), param.device_mesh, param.placements, src_data_rank=None
        )
        if isinstance(value, Tensor) and value.shape == param.shape
        else value
        for name, value in decoded(state).items()
    }
