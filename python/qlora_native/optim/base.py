"""The base class of the optimizers: one step over all parameters, their states, checkpoints.

Parameters may be sharded over ranks (DTensors, as FSDP2 makes them): each rank updates its own part; the norm of the
gradients and ``state_dict`` are those of the whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _C, _native, reference
from qlora_native.ops import _library
from qlora_native.ops._operands import is_sharded, part_of
from qlora_native.ops._optim import Plan, address_of
from qlora_native.optim import paging
from qlora_native.optim.paging import (
    PAGING_DEFAULTS,
    HostPages,
    Moments,
    Paged,
    Pages,
    Paging,
    PagingStatistics,
    Wanted,
    is_coded,
    new_states,
)

MIN_CODED_NUMEL = 4096  # smaller tensors keep 32-bit states under bits=8


class Optimizer(torch.optim.Optimizer):
    """Base class of AdamW, Adam and Lion, which name their op and the arguments that it takes from a group."""

    _moments: ClassVar[Moments]

    # GradScaler leaves unscaling and skipping to step(), by way of the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True
    _counts_steps: ClassVar[bool]
    _op: ClassVar[str]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        paged: Paged,
        page_dir: str | Path | None,
        page_budget: int | None,
        max_norm: float | None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{type(self).__name__}: max_norm is {max_norm}: expected a number above 0, or None.")
        self._set_paging(paged, page_dir, page_budget)
        self._reset()
        self.max_norm = max_norm
        super().__init__(params, defaults)
        if paged is True:  # fail here, not in the first step, if there is no room for the page file
            self._reserve_all()

    def _set_paging(self, paged: Paged, page_dir: str | Path | None, page_budget: int | None) -> None:
        name = type(self).__name__
        folder = None if page_dir is None else Path(page_dir)
        self.paged = paged
        self.page_dir = folder
        self.page_budget = page_budget
        make = partial(new_pages, name, self._moments, paged, folder, page_budget)
        self._paging = Paging(name, paged, page_budget, make)

    def _reset(self) -> None:
        self._plan: Plan | None = None
        self._grad_norm: float | Tensor | None = None
        self._skipped: bool | Tensor = False

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; None without ``max_norm``."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def skipped(self) -> bool:
        """The last step changed nothing, because a gradient was not finite."""
        return bool(self._skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ValueError for options and dtypes that are not supported."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            if self.paged is True and self._paging.pages:
                self._reserve_all()
        except (ValueError, OSError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group["bits"] not in (8, 32):
            raise ValueError(f"{name}: bits is {group['bits']}: expected 32 or 8.")
        if len(group["betas"]) != 2 or not all(0 <= float(beta) < 1 for beta in group["betas"]):
            raise ValueError(f"{name}: betas is {group['betas']}: expected two numbers from 0 up to, not including, 1.")
        for key in ("lr", "eps", "weight_decay"):
            if not 0 <= float(group.get(key, 0)) < math.inf:
                raise ValueError(f"{name}: {key} is {group[key]}: expected 0 or more, and finite.")
        for param in group["params"]:
            if param.dtype not in _native.DTYPE_NUMBER:
                raise ValueError(
                    f"{name}: a parameter {list(param.shape)} is {param.dtype}: expected float32, bfloat16 or float16."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._paging.alone():
            self._step()
        # Kernels write parameters as autograd does not see.
        torch.autograd.graph.increment_version([param for param, _ in self._placed()])
        return loss

    def write_options(self) -> None:
        """Writes the options of the groups, such as ``lr``, where a step that a CUDA graph holds reads them.

        To be called before a replay when they have changed, and before the capture. Not in the graph: ``max_norm``,
        and which parameters have a gradient, are those of the capture. Does nothing on a CPU.
        """
        if self._plan is not None and self._plan.on_device is not None:
            self._plan.on_device.write_options([self._options(group) for group in self.param_groups])

    def _step(self) -> None:
        self._grad_norm = None
        self._skipped = False
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        params, groups, grads = self._with_gradient()
        sharded = self.max_norm is not None and any(map(is_sharded, params))
        norm = whole_norm(params, grads) if sharded else None  # every rank takes part, whatever its gradients
        if params and norm is None and self._step_on_device(params, groups, grads, grad_scale, found_inf):
            return
        if found_inf is not None and float(found_inf) != 0:
            self._skipped = True
            return
        if not params:
            return
        plan = self._plan_for(params, groups)
        native = plan.point_at(grads, torch.device("cpu"))
        factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        if self.max_norm is not None:
            if norm is None:
                norm = _C.gradient_norm(address_of(plan.table), len(params)) if native else whole_norm(params, grads)
            self._grad_norm = norm = factor * norm
            if not math.isfinite(norm):
                self._skipped = True
                return
            factor *= min(1.0, self.max_norm / (norm + 1e-6))
        if native:
            self._step_natively(plan, factor)
        elif not sharded or not self._step_on_device(params, groups, grads, None, None, factor):
            self._step_by_ops(plan, grads, factor)

    def _with_gradient(self) -> tuple[list[Tensor], list[int], list[Tensor]]:
        """The parameters that have a gradient, the number of the group of each, and the gradients."""
        found = [
            (param, number)
            for number, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.grad is not None
        ]
        params = [param for param, _ in found]
        groups = [number for _, number in found]
        grads: list[Any] = [param.grad for param in params]
        if odd := {grad.layout for grad in grads} - {torch.strided}:
            raise ValueError(
                f"{type(self).__name__}: a gradient is {odd.pop()}: expected dense ones; build the embedding with "
                "sparse=False, or give its parameter to torch.optim.SparseAdam."
            )
        return params, groups, list(map(part_of, grads))

    def _placed(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its group."""
        return [(param, group) for group in self.param_groups for param in group["params"]]

    def _plan_for(self, params: list[Tensor], groups: list[int]) -> Plan:
        """The plan of the last step, or a new one, with states for parameters that had none."""
        if self._plan is None or not self._plan.still_holds(params, groups):
            if not all(self.state[param] for param in params):
                self._reserve_all()
            for param, number in zip(params, groups, strict=True):
                if not self.state[param]:
                    self.state[param] = self._new_state(param, self._is_coded(param, self.param_groups[number]))
            self._plan = Plan(params, groups, [self.state[param] for param in params])
        return self._plan

    def _step_on_device(
        self,
        params: list[Tensor],
        groups: list[int],
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        grad_factor: float | None = None,  # where the norm is known already
    ) -> bool:
        """Launch the step, if all tensors are on one CUDA device in the form its kernels take; waits for nothing."""
        device = params[0].device
        module = _library.module_for(device)
        pages = self._device_pages(device)
        if pages is not None and pages.could_pin and pages.is_short():
            self._paging.pin(pages, self.state)
        if module is None:
            return False
        plan = self._plan_for(params, groups)
        pages = self._device_pages(device)  # the plan may have made them
        if pages is not None and not pages.holds(plan):
            pages = None
        if not plan.point_at(grads, device):
            return False
        from qlora_native.ops._cuda_optim import DeviceTable, Scaling

        if plan.on_device is None:
            plan.on_device = DeviceTable(module, self._op, plan.table, len(params), device)
        options = [self._options(group) for group in self.param_groups]
        scale, skip = (None if t is None else t.to(device, torch.float32) for t in (grad_scale, found_inf))
        by = Scaling(1.0, self.max_norm, scale, skip) if grad_factor is None else Scaling(grad_factor)
        if pages is None:
            plan.on_device.step(plan.table, options, by)
        else:
            pages.step(plan, options, by)
        if by.max_norm is not None:
            self._grad_norm = plan.on_device.grad_norm
        if by.max_norm is not None or found_inf is not None:
            self._skipped = plan.on_device.skipped
        return True

    def _device_pages(self, device: torch.device) -> Any:
        pages = self._paging.pages.get(device)
        return None if isinstance(pages, HostPages) else pages

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options of a group in the order of the op's arguments."""
        raise NotImplementedError

    def _step_natively(self, plan: Plan, grad_factor: float) -> None:
        pager: tuple[_C.Pager | None, int, int] = (None, 0, 0)
        if isinstance(pages := self._paging.pages.get(torch.device("cpu")), HostPages):
            pager = pages.pager, address_of(pages.numbers(plan)), pages.budget_now()
        options = [self._options(group) for group in self.param_groups]
        getattr(_C, self._op)(address_of(plan.table), len(plan.params), options, grad_factor, *pager)

    def _step_by_ops(self, plan: Plan, grads: list[Tensor], grad_factor: float) -> None:
        """The same step, one op for each group, device and form of the states."""
        calls: dict[tuple[int, torch.device, bool], list[int]] = {}
        for i, (param, number, state) in enumerate(zip(plan.params, plan.groups, plan.states, strict=True)):
            calls.setdefault((number, param.device, is_coded(state)), []).append(i)
        names = [*self._moments, *(f"{name}_absmax" for name in self._moments)]
        names += ["step"] if self._counts_steps else []
        for (number, _, _), chosen in calls.items():
            states = [plan.states[i] for i in chosen]
            lists = ([state[name] for state in states if name in state] for name in names)
            params = [plan.parts[i] for i in chosen]
            chosen_grads = [grads[i] for i in chosen]
            options = self._options(self.param_groups[number])
            getattr(torch.ops.qlora_native, self._op)(params, chosen_grads, *lists, *options, grad_factor)
            for pages in self._paging.pages.values():
                pages.keep_within_budget()

    def _is_coded(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["bits"] == 8) and param.numel() >= MIN_CODED_NUMEL

    def _reserve_all(self) -> None:
        self._reserve([(param, self._is_coded(param, group)) for param, group in self._placed()])

    def _reserve(self, wanted: Wanted) -> None:
        """Make places for the states of these parameters, if they may leave memory."""
        if self._paging.reserve(wanted):
            from qlora_native.optim.pressure import watch

            watch(self, paging.free_memory)

    def _new_state(self, param: Tensor, coded: bool, blank: bool = True) -> dict[str, Any]:
        """The states of a parameter, zeros if ``blank``; where they have a place reserved, there."""
        state: dict[str, Any] = {}
        if self._counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        place = self._paging.take(param, coded, blank)
        if place is None:
            device = param.device
            place = new_states(
                self._moments, param, coded, lambda _, shape, dtype: torch.zeros(shape, dtype=dtype, device=device)
            )
        return state | place

    def page_out(self) -> None:
        """Sends all states out of memory, into the page file. Nothing happens with ``paged=False``; with "auto", if the
        file cannot be had, a warning says so, once, and the states stay. The values are the same wherever they are."""
        with self._paging.alone():
            self._paging.page_out(self.state)

    def page_in(self) -> None:
        """Brings states that "auto" sent out back into ordinary memory, as far as there is room."""
        with self._paging.alone():
            self._paging.page_in()

    def states_in_memory(self) -> int:
        """Bytes of states in ordinary memory that ``page_out`` would free; 0 if there is no page file to be had."""
        return self._paging.states_in_memory(self.state)

    def states_paged_out(self) -> int:
        """Bytes of states in the page file; some may be resident."""
        return self._paging.states_paged_out()

    def paging_statistics(self) -> PagingStatistics:
        """What is where, what was moved and what it cost, since the optimizer was made. From any thread, also while a
        step runs."""
        return self._paging.statistics()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Its tensors are the states themselves: copy them to keep them from the next step. Those of
        sharded parameters are fp32 DTensors, which any number of ranks can load."""
        with self._paging.alone():
            self._paging.wait_until_readable()
            result = super().state_dict()
            for number, (param, _) in enumerate(self._placed()):
                if is_sharded(param) and self.state.get(param):
                    result["state"][number] = whole_states(param, self.state[param], list(self._moments))
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
            loaded = [
                (param, group, self._checked_state(param, given["state"][number]))
                for number, (param, group) in zip(numbers, self._placed(), strict=True)
                if number in given["state"]
            ]
            self._reserve_all()
            self._paging.copy_displaced((param, state) for param, _, state in loaded)
            for param, group, state in loaded:
                self.state[param] = self._fitted(param, state, group)

        with (
            self.register_load_state_dict_pre_hook(hold),
            self.register_load_state_dict_post_hook(fit, prepend=True),
            self._paging.alone(),
        ):
            super().load_state_dict(state_dict)

    def _checked_state(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A loaded state, this rank's parts of it; ValueError if it is not one of this optimizer."""
        given = {key: part_of(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        for name in self._moments:
            value = given.get(name)
            shape = value.shape if isinstance(value, Tensor) else None
            if shape != part_of(param).shape or (self._counts_steps and "step" not in given):
                raise ValueError(
                    f"{type(self).__name__}: the state of a parameter {list(param.shape)} holds "
                    f"{', '.join(sorted(given)) or 'nothing'}, {name} {None if shape is None else list(shape)}: "
                    "expected the states of this optimizer, of the parameter's shape."
                )
        blocks = (-(-part_of(param).numel() // reference.STATE_BLOCK),)
        for name, value in given.items():
            wrong = ""
            is_tensor = isinstance(value, Tensor)
            is_scale = name.endswith("_absmax")
            code = self._moments.get(name) if f"{name}_absmax" in given else None
            if is_tensor and (value.layout != torch.strided or value.is_meta):
                wrong = f"is on {value.device} as {value.layout}: expected a dense tensor with values"
            elif name == "step" and not (float(value).is_integer() and 0 <= float(value) < 1 << 31):
                wrong = f"is {float(value)}: expected a whole number from 0 up to, not including, 2^31"
            elif is_scale and getattr(value, "shape", None) != blocks:
                wrong = f"is no tensor of {blocks[0]} numbers: expected one for {reference.STATE_BLOCK} codes"
            elif (
                name != "step" and is_tensor and value.dtype not in (_native.DTYPE_NUMBER if code is None else (code,))
            ):
                wrong = f"is {value.dtype}: expected {code or 'float32, bfloat16 or float16'}"
            elif is_tensor and not reference.is_finite(value):
                wrong = "holds a NaN or an infinity: expected finite numbers"
            elif (is_scale or self._moments.get(name) == torch.uint8) and value.numel() and value.min() < 0:
                wrong = f"holds {float(value.min()):g}: expected 0 or more"
            if wrong:
                raise ValueError(f"{type(self).__name__}: {name} of a parameter {list(param.shape)} {wrong}.")
        return given

    def _fitted(self, param: Tensor, given: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """A loaded state in the form that the group asks for."""
        coded = self._is_coded(param, group)
        state = self._new_state(param, coded, blank=False)
        for name in self._moments:
            absmax = given.get(f"{name}_absmax")
            value = given[name].detach().to(param.device)
            if (absmax is None) == coded or value.dtype != state[name].dtype:
                value = value.float() if absmax is None else reference.decode_state(value, absmax.to(param.device))
                if coded:
                    value, absmax = reference.encode_state(value, signed=self._moments[name] == torch.int8)
            state[name].copy_(value)
            if coded:
                state[f"{name}_absmax"].copy_(absmax)
        if self._counts_steps:
            state["step"].fill_(float(given["step"]))
        return state

    def __getstate__(self) -> dict[str, Any]:
        self._paging.wait_until_readable()
        options = {name: getattr(self, name) for name in ("max_norm", *PAGING_DEFAULTS)}
        return {**super().__getstate__(), **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        if "defaults" in state:  # a copy or from a pickle; load_state_dict comes by here, too
            self._set_paging(*(state.get(key, default) for key, default in PAGING_DEFAULTS.items()))
        for group in self.param_groups:
            group.update({**self.defaults, **group})
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(
                    f"{type(self).__name__}: the state was made with amsgrad or maximize: neither is here."
                )
        if "defaults" in state and self.state:
            self._reserve_all()
            for param, group in self._placed():
                if self.state.get(param):
                    self.state[param] = self._fitted(param, self.state[param], group)


def new_pages(
    owner: str, moments: Moments, paged: Paged, folder: Path | None, budget: int | None, device: torch.device
) -> Pages | None:
    """None for devices that have no page store: their states are ordinary tensors."""
    module = _library.module_for(device)
    if module is not None:
        from qlora_native.optim.device_pages import DevicePages

        return DevicePages(owner, moments, paged, budget, device, module)
    if device.type == "cpu":
        return HostPages(owner, moments, paged, folder, budget)
    if paged is True:
        raise ValueError(
            f"{owner}: paged is True, but states on {device} cannot be paged by this build: leave paged at 'auto', "
            "or move the parameters to the CPU."
        )
    return None


def whole_norm(params: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients, of which ``grads`` are this rank's parts: every rank gets the same number."""
    parts: dict[Any, dict[torch.device, list[Tensor]]] = {}  # by mesh and placements, None for what is not sharded
    for param, grad in zip(params, grads, strict=True):
        where = (param.device_mesh, param.placements) if is_sharded(param) else None  # type: ignore[attr-defined]
        parts.setdefault(where, {}).setdefault(grad.device, []).append(grad)
    total = 0.0
    for where, by_device in parts.items():
        square = sum(float(torch.ops.qlora_native.gradient_norm(part)) ** 2 for part in by_device.values())
        if where is not None:
            mesh, placements = where
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    shared = torch.tensor(square, dtype=torch.float64, device=next(iter(by_device)))
                    torch.distributed.all_reduce(shared, group=mesh.get_group(dimension))
                    square = float(shared)
        total += square
    return math.sqrt(total)


def whole_states(param: Any, state: dict[str, Any], moments: Sequence[str]) -> dict[str, Any]:
    """The states of a sharded parameter as fp32 DTensors sharded like it.

    8-bit states are decoded, because the blocks that share a scale end where a rank's part ends: another number of
    ranks has other blocks. Encoded again in the same blocks they are the same bytes.
    """
    from torch.distributed.tensor import DTensor

    result = {name: value for name, value in state.items() if not name.endswith("_absmax")}
    layout = {"run_check": False, "shape": param.shape, "stride": param.stride()}
    for name in moments:
        absmax = state.get(f"{name}_absmax")
        part = state[name] if absmax is None else reference.decode_state(state[name], absmax)
        result[name] = DTensor.from_local(part, param.device_mesh, param.placements, **layout)
    return result
