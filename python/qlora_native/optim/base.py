"""What the optimizers share: one step over all parameters, their states, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _C, _native, reference
from qlora_native.ops import _cuda_kernels
from qlora_native.ops import _tensor_rows as rows
from qlora_native.ops._cuda_optim import DeviceTable, Scaling
from qlora_native.ops._optim_plan import Plan
from qlora_native.optim.device_pages import DevicePages
from qlora_native.optim.pages import HostPages, Paged
from qlora_native.optim.paging import PAGING_DEFAULTS, PagedStates
from qlora_native.optim.shards import is_sharded, local, whole_norm, whole_states

Paging = tuple[_C.Pager | None, int, int]  # the native functions' last arguments: pager, numbers, budget_bytes
MIN_CODED_NUMEL = 4096  # smaller tensors keep 32-bit states under bits=8


class _Held:
    """A tensor that torch's load_state_dict passes on as it is, instead of casting it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Optimizer(PagedStates, torch.optim.Optimizer):
    """What AdamW, Adam and Lion share."""

    # GradScaler leaves unscaling and skipping to step(), by way of the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True
    _counts_steps: ClassVar[bool]

    max_norm: float | None
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
        if paged is True:  # no room for the page file is to be known at the start
            self._reserve_all()

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
        """As torch's; ValueError for options and dtypes that cannot be."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            if self.paged is True and self._pages:
                self._reserve_all()
        except (ValueError, OSError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group["bits"] not in (8, 32):
            raise ValueError(f"{name}: bits is {group['bits']}: expected 32 or 8.")
        if not float(group["lr"]) >= 0:
            raise ValueError(f"{name}: lr is {group['lr']}: expected 0 or more.")
        if len(group["betas"]) != 2 or not all(0 <= float(beta) < 1 for beta in group["betas"]):
            raise ValueError(f"{name}: betas is {group['betas']}: expected two numbers from 0 up to, not including, 1.")
        for key in ("eps", "weight_decay"):
            if not float(group.get(key, 0)) >= 0:
                raise ValueError(f"{name}: {key} is {group[key]}: expected 0 or more.")
        for param in group["params"]:
            if param.dtype not in _native.DTYPE_NUMBER:
                raise ValueError(
                    f"{name}: a parameter {list(param.shape)} is {param.dtype}: expected float32, bfloat16 or float16."
                )

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._alone():
            self._step()
        return loss

    def _step(self) -> None:
        self._grad_norm, self._skipped = None, False
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        params, groups, grads = self._with_gradient()
        cut_norm = self._norm_over_ranks(params, grads)
        if params and cut_norm is None and self._step_on_device(params, groups, grads, grad_scale, found_inf):
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
            if cut_norm is not None:
                norm = cut_norm
            elif native:
                norm = _C.gradient_norm(rows.address_of(plan.table), len(params))
            else:
                norm = whole_norm(params, grads)
            self._grad_norm = norm = factor * norm
            if not math.isfinite(norm):
                self._skipped = True
                return
            factor *= min(1.0, self.max_norm / (norm + 1e-6))
        if native:
            self._step_natively(rows.address_of(plan.table), len(params), factor, self._paging_of(plan))
        elif cut_norm is None or not self._step_on_device(params, groups, grads, None, None, factor):
            self._step_by_ops(plan, grads, factor)

    def _norm_over_ranks(self, params: list[Tensor], grads: list[Tensor]) -> float | None:
        """The norm to clip by where parameters are cut over ranks, and every rank must ask for it; else None."""
        if self.max_norm is None or not any(map(is_sharded, params)):
            return None
        return whole_norm(params, grads)

    def _with_gradient(self) -> tuple[list[Tensor], list[int], list[Tensor]]:
        """The parameters that have a gradient, the number of the group of each, and the gradients."""
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        groups = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        grads = [param.grad for param in params]
        present = [grad for grad in grads if grad is not None]
        if len(present) < len(grads):
            kept = [i for i, grad in enumerate(grads) if grad is not None]
            params, groups = [params[i] for i in kept], [groups[i] for i in kept]
        layouts = [grad.layout for grad in present]
        if layouts.count(torch.strided) < len(layouts):
            odd = next(layout for layout in layouts if layout is not torch.strided)
            raise ValueError(
                f"{type(self).__name__}: a gradient is {odd}: expected dense ones; build the embedding with "
                "sparse=False, or give its parameter to torch.optim.SparseAdam."
            )
        return params, groups, list(map(local, present))

    def _plan_for(self, params: list[Tensor], groups: list[int]) -> Plan:
        """The plan of the last step, or a new one, which makes the states of parameters that are met for the first
        time."""
        if self._plan is None or not self._plan.still_holds(params, groups):
            if not all(self.state[param] for param in params):
                self._reserve_all()
            for param, number in zip(params, groups, strict=True):
                if not self.state[param]:
                    self.state[param] = self._new_state(param, self._is_coded(param, self.param_groups[number]))
            self._plan = Plan(params, groups, [self.state[param] for param in params])
        return self._plan

    def _paging_of(self, plan: Plan) -> Paging:
        pages = self._pages.get(torch.device("cpu"))
        if not isinstance(pages, HostPages):
            return None, 0, 0
        if plan.numbers is None:
            plan.numbers = pages.numbers(plan.params, plan.states)
        return pages.pager, rows.address_of(plan.numbers), pages.budget_now()

    def _step_on_device(
        self,
        params: list[Tensor],
        groups: list[int],
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clipped_by: float | None = None,  # what gradients are multiplied by where the norm is known already
    ) -> bool:
        """Launches the step, if all is on one CUDA device and as its kernels take it; waits for nothing."""
        device = params[0].device
        module = _cuda_kernels.module_for(device)
        pages = self._pages.get(device)
        if isinstance(pages, DevicePages) and pages.could_pin and pages.is_short():
            self._pin(pages)
        plan = None if module is None else self._plan_for(params, groups)
        pages = self._pages.get(device)
        if plan is not None and not (isinstance(pages, DevicePages) and pages.holds(plan)):
            pages = None
        if module is None or plan is None or not plan.point_at(grads, device):
            return False
        if plan.on_device is None:
            plan.on_device = DeviceTable(module, self._op, plan.table, len(params), device)
        options = [self._options(group) for group in self.param_groups]
        scale, skip = (None if t is None else t.to(device, torch.float32) for t in (grad_scale, found_inf))
        by = Scaling(1.0, self.max_norm, scale, skip) if clipped_by is None else Scaling(clipped_by)
        if isinstance(pages, DevicePages):
            pages.step(plan, options, by)
        else:
            plan.on_device.step(plan.table, options, by)
        if by.max_norm is not None:
            self._grad_norm = plan.on_device.grad_norm
        if by.max_norm is not None or found_inf is not None:
            self._skipped = plan.on_device.skipped
        return True

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError

    def _step_natively(self, table: int, num_tensors: int, grad_factor: float, paging: Paging) -> None:
        raise NotImplementedError

    def _step_by_op(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Any], grad_factor: float
    ) -> None:
        raise NotImplementedError

    def _step_by_ops(self, plan: Plan, grads: list[Tensor], grad_factor: float) -> None:
        """The same step, one op for each group, device and form of the states."""
        parts: dict[tuple[int, torch.device, bool], list[int]] = {}
        for i, (param, number, state) in enumerate(zip(plan.params, plan.groups, plan.states, strict=True)):
            parts.setdefault((number, param.device, "exp_avg_absmax" in state), []).append(i)
        for (number, _, _), chosen in parts.items():
            self._step_by_op(
                self.param_groups[number],
                [plan.parts[i] for i in chosen],
                [grads[i] for i in chosen],
                [plan.states[i] for i in chosen],
                grad_factor,
            )
            self._keep_within_budget()

    # -----------------------------------------------------------------------------------------------------------------
    # States

    def _is_coded(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["bits"] == 8) and param.numel() >= MIN_CODED_NUMEL

    def _reserve_all(self) -> None:
        self._reserve(
            [(param, self._is_coded(param, group)) for group in self.param_groups for param in group["params"]]
        )

    def _new_state(self, param: Tensor, coded: bool, blank: bool = True) -> dict[str, Any]:
        """The states of a parameter, zeros if ``blank``; where they have a place reserved, there."""
        state: dict[str, Any] = {}
        if self._counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        place = self._take(param, coded, blank)
        if place is not None:
            return state | place
        part = local(param)
        blocks = -(-part.numel() // _native.STATE_BLOCK)
        for name, codes in self._moments.items():
            dtype = codes if coded else torch.float32
            state[name] = torch.zeros(part.shape, dtype=dtype, device=param.device)
            if coded:
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        return state

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Its tensors are the states themselves: copy them to keep them from the next step. Those of
        parameters cut over ranks are DTensors of fp32, which any number of ranks can load."""
        with self._alone():
            self._ready_to_read()
            told = super().state_dict()
            cut = [
                (number, param)
                for number, param in enumerate(chain.from_iterable(group["params"] for group in self.param_groups))
                if is_sharded(param) and self.state.get(param)
            ]
            for number, param in cut:
                told["state"][number] = whole_states(param, self.state[param], list(self._moments))
            return told

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtype, are copied, and take the form that the group's ``bits`` asks for:
        a checkpoint of ``torch.optim.AdamW`` or of the other number of bits can be continued. ValueError for states
        that do not fit."""

        def hold(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            held = {
                number: {key: _Held(value) if isinstance(value, Tensor) else value for key, value in state.items()}
                for number, state in given["state"].items()
            }
            return {**given, "state": held}

        def release(_: Any) -> None:
            loaded = [
                (param, group, self._held_by(param))
                for group in self.param_groups
                for param in group["params"]
                if param in self.state
            ]
            self._reserve_all()
            for param, group, given in self._apart(loaded):
                self.state[param] = self._fitted(param, given, group)

        hooks = (
            self.register_load_state_dict_pre_hook(hold),
            self.register_load_state_dict_post_hook(release, prepend=True),
        )
        try:
            with self._alone():
                super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _held_by(self, param: Tensor) -> dict[str, Any]:
        """What was loaded as the state of a parameter; ValueError if it is no such state."""
        held = {key: value.tensor if isinstance(value, _Held) else value for key, value in self.state[param].items()}
        given = {key: local(value) if isinstance(value, Tensor) else value for key, value in held.items()}
        for name in self._moments:
            value = given.get(name)
            if (
                not isinstance(value, Tensor)
                or value.shape != local(param).shape
                or (self._counts_steps and "step" not in given)
            ):
                shape = list(value.shape) if isinstance(value, Tensor) else None
                raise ValueError(
                    f"{type(self).__name__}: the state of a parameter {list(param.shape)} holds "
                    f"{', '.join(sorted(given)) or 'nothing'}, {name} {shape}: expected the states of this optimizer, "
                    "of the parameter's shape."
                )
        return given

    def _fitted(self, param: Tensor, given: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """A state of our own from a loaded one."""
        coded = self._is_coded(param, group)
        state = self._new_state(param, coded, blank=False)
        for name in self._moments:
            absmax = given.get(f"{name}_absmax")
            value = given[name].detach().to(param.device)
            if (absmax is not None) == coded and value.dtype == state[name].dtype:
                state[name].copy_(value)
                if coded:
                    state[f"{name}_absmax"].copy_(absmax)
                continue
            wide = value.float() if absmax is None else reference.decode_state(value, absmax.to(param.device))
            if coded:
                codes, absmax = reference.encode_state(wide, signed=self._moments[name] == torch.int8)
                state[f"{name}_absmax"].copy_(absmax)
                wide = codes
            state[name].copy_(wide)
        if self._counts_steps:
            state["step"].fill_(float(given["step"]))
        return state

    def __getstate__(self) -> dict[str, Any]:
        self._ready_to_read()
        return {**super().__getstate__(), "max_norm": self.max_norm, **self._paging_options()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        if "defaults" in state:  # a copy or from a pickle; load_state_dict comes by here, too
            self._set_paging(*(state.get(key, default) for key, default in PAGING_DEFAULTS.items()))
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(
                    f"{type(self).__name__}: the state was made with amsgrad or maximize: neither is here."
                )
        if "defaults" in state and self.state:
            self._reserve_all()
            for group in self.param_groups:
                for param in group["params"]:
                    if self.state.get(param):
                        self.state[param] = self._fitted(param, self.state[param], group)
