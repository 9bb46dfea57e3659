"""Optimisers with one native call a step: ``AdamW``, ``Adam`` and ``Lion``, with 32-bit or 8-bit states.

They are ``torch.optim.Optimizer``: learning-rate schedulers, parameter groups, hooks, closures, ``state_dict``,
deepcopy and ``GradScaler`` work as with torch's own. The differences:

* ``max_norm`` clips inside ``step()``: one sweep measures the norm of all gradients, a second one updates with every
  gradient multiplied by ``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` would leave them;
  ``.grad`` itself is not written. ``optimizer.grad_norm`` is the norm before clipping. If it is not finite, nothing is
  updated, no step is counted, and ``optimizer.skipped`` is True until the next step. ``max_norm=math.inf`` measures and
  skips without clipping; without ``max_norm`` there is no first sweep, and what is not finite spreads as in torch.
* ``bits=8`` keeps the moments as 8-bit dynamic codes, each block of 256 elements relative to its largest magnitude
  (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): 2.03 bytes a parameter instead of 8. Tensors
  below 4096 elements keep 32-bit states: they weigh little, and norms and biases are sensitive. A block in which a
  moment overflows becomes NaN as a whole; ``max_norm`` prevents that.
* Parameters may be float32, bfloat16 or float16; the update is computed in float32 and rounded once. States are float32
  or codes, whatever the parameter's dtype.
* On the CPU the bytes written depend neither on the instruction set nor on the number of threads. The CUDA kernels give
  the same bytes in two launches (in the emulator; they have not run on hardware); the host waits for them only where
  ``grad_norm`` or ``skipped`` is read. Elsewhere, and for gradients of another dtype than their parameter's, the plain
  torch reference computes the same, slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import _C, _native, reference
from .ops import _cuda_kernels
from .ops import _tensor_rows as rows
from .ops._cuda_optim import DeviceTable, Scaling
from .ops._optim_plan import Plan

Paged = Literal["auto"] | bool

MIN_CODED_NUMEL = 4096  # smaller tensors keep 32-bit states under bits=8


class _Held:
    """A tensor that torch's load_state_dict passes on as it is, instead of casting it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Optimizer(torch.optim.Optimizer):
    """What AdamW, Adam and Lion share."""

    # GradScaler leaves unscaling and skipping to step(), by way of the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True
    _moments: ClassVar[dict[str, torch.dtype]]  # name of a state -> dtype of its codes
    _counts_steps: ClassVar[bool]

    max_norm: float | None
    _op: ClassVar[str]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        paged: Paged,
        page_dir: str | Path | None,
        max_norm: float | None,
    ) -> None:
        name = type(self).__name__
        if paged not in (True, False, "auto"):
            raise ValueError(f"{name}: paged is {paged!r}: expected 'auto', True or False.")
        if paged is True:
            raise ValueError(
                f"{name}: paged is True, but this release has no paged states yet: leave paged at 'auto', "
                "or use bits=8, which takes a quarter of the memory."
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{name}: max_norm is {max_norm}: expected a number above 0, or None.")
        self._reset()
        self.max_norm = max_norm
        super().__init__(params, defaults)

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
        except ValueError:
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
        self._grad_norm, self._skipped = None, False
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        params, groups, grads = self._with_gradient()
        if params and self._step_on_device(params, groups, grads, grad_scale, found_inf):
            return loss
        if found_inf is not None and float(found_inf) != 0:
            self._skipped = True
            return loss
        if not params:
            return loss
        plan = self._plan_for(params, groups)
        native = plan.point_at(grads, torch.device("cpu"))
        factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        if self.max_norm is not None:
            norm = _C.gradient_norm(rows.address_of(plan.table), len(params)) if native else _norm_of(grads)
            self._grad_norm = norm = factor * norm
            if not math.isfinite(norm):
                self._skipped = True
                return loss
            factor *= min(1.0, self.max_norm / (norm + 1e-6))
        if native:
            self._step_natively(rows.address_of(plan.table), len(params), factor)
        else:
            self._step_by_ops(plan, grads, factor)
        return loss

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
        return params, groups, present

    def _plan_for(self, params: list[Tensor], groups: list[int]) -> Plan:
        """The plan of the last step, or a new one, which makes the states of parameters that are met for the first
        time."""
        if self._plan is None or not self._plan.still_holds(params, groups):
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
    ) -> bool:
        """Launches the step, if all is on one CUDA device and as its kernels take it; waits for nothing."""
        device = params[0].device
        module = _cuda_kernels.module_for(device)
        plan = None if module is None else self._plan_for(params, groups)
        if module is None or plan is None or not plan.point_at(grads, device):
            return False
        if plan.on_device is None:
            plan.on_device = DeviceTable(module, self._op, plan.table, len(params), device)
        options = [self._options(group) for group in self.param_groups]
        scale, skip = (None if t is None else t.to(device, torch.float32) for t in (grad_scale, found_inf))
        plan.on_device.step(plan.table, options, Scaling(1.0, self.max_norm, scale, skip))
        if self.max_norm is not None:
            self._grad_norm = plan.on_device.grad_norm
        if self.max_norm is not None or found_inf is not None:
            self._skipped = plan.on_device.skipped
        return True

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError

    def _step_natively(self, table: int, num_tensors: int, grad_factor: float) -> None:
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
                [plan.params[i] for i in chosen],
                [grads[i] for i in chosen],
                [plan.states[i] for i in chosen],
                grad_factor,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # States

    def _is_coded(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["bits"] == 8) and param.numel() >= MIN_CODED_NUMEL

    def _new_state(self, param: Tensor, coded: bool) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        blocks = -(-param.numel() // _native.STATE_BLOCK)
        for name, codes in self._moments.items():
            dtype = codes if coded else torch.float32
            state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)
            if coded:
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        return state

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
            for group in self.param_groups:
                for param in group["params"]:
                    if param in self.state:
                        self.state[param] = self._fitted(param, self.state[param], group)

        hooks = (
            self.register_load_state_dict_pre_hook(hold),
            self.register_load_state_dict_post_hook(release, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _fitted(self, param: Tensor, loaded: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """A state of our own from a loaded one."""
        given = {key: value.tensor if isinstance(value, _Held) else value for key, value in loaded.items()}
        coded = self._is_coded(param, group)
        state = self._new_state(param, coded)
        for name in self._moments:
            value, absmax = given.get(name), given.get(f"{name}_absmax")
            if (
                not isinstance(value, Tensor)
                or value.shape != param.shape
                or (self._counts_steps and "step" not in given)
            ):
                shape = list(value.shape) if isinstance(value, Tensor) else None
                raise ValueError(
                    f"{type(self).__name__}: the state of a parameter {list(param.shape)} holds "
                    f"{', '.join(sorted(given)) or 'nothing'}, {name} {shape}: expected the states of this optimiser, "
                    "of the parameter's shape."
                )
            value = value.detach().to(param.device)
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
        return {**super().__getstate__(), "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(
                    f"{type(self).__name__}: the state was made with amsgrad or maximize: neither is here."
                )


def _norm_of(grads: list[Tensor]) -> float:
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    op = torch.ops.qlora_native.gradient_norm
    return math.sqrt(sum(float(op(part)) ** 2 for part in by_device.values()))


class AdamW(_Optimizer):
    """Adam with decoupled weight decay; the update of ``torch.optim.AdamW`` (Loshchilov and Hutter 2019).

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimiser.
        lr: learning rate. betas: decay of the two averages. eps: added to the denominator.
        weight_decay: each step first multiplies the parameter by ``1 - lr * weight_decay``.
        bits: 32, or 8 for coded states; a group may have its own.
        paged: "auto" or False; True raises ValueError, since there are no paged states yet.
        page_dir: folder of paged states; not used without them.
        max_norm: clips the norm of all gradients together; see the module's text.

    Raises ValueError for values out of range, for parameters that are not float32, bfloat16 or float16, and, in
    ``step``, for sparse gradients.
    """

    _moments: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
    _counts_steps = True
    _op = "adamw_step"
    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: Literal[8, 32] = 32,
        paged: Paged = "auto",
        page_dir: str | Path | None = None,
        *,
        max_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits}
        super().__init__(params, defaults, paged, page_dir, max_norm)

    def _options(self, group: dict[str, Any]) -> tuple[float, float, float, float, float, bool]:
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        return (*map(float, numbers), self._decoupled)  # type: ignore[return-value]

    def _step_natively(self, table: int, num_tensors: int, grad_factor: float) -> None:
        _C.adamw_step(table, num_tensors, [self._options(group) for group in self.param_groups], grad_factor)

    def _step_by_op(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        grad_factor: float,
    ) -> None:
        names = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "step")
        lists = ([state[name] for state in states if name in state] for name in names)
        torch.ops.qlora_native.adamw_step(params, grads, *lists, *self._options(group), grad_factor)


class Adam(AdamW):
    """Adam (Kingma and Ba 2015); the update of ``torch.optim.Adam``: ``weight_decay`` is added to the gradient.

    Arguments as for :class:`AdamW`.
    """

    _decoupled = False


class Lion(_Optimizer):
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"): one average, and steps of ``lr`` in the
    direction of ``sign(beta1 * average + (1 - beta1) * gradient)``.

    Its authors advise a learning rate 3 to 10 times smaller than AdamW's, with a weight decay as much larger. Arguments
    as for :class:`AdamW`.
    """

    _moments: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8}
    _counts_steps = False
    _op = "lion_step"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        bits: Literal[8, 32] = 32,
        paged: Paged = "auto",
        page_dir: str | Path | None = None,
        *,
        max_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "bits": bits}
        super().__init__(params, defaults, paged, page_dir, max_norm)

    def _options(self, group: dict[str, Any]) -> tuple[float, float, float, float]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), float(group["weight_decay"])

    def _step_natively(self, table: int, num_tensors: int, grad_factor: float) -> None:
        _C.lion_step(table, num_tensors, [self._options(group) for group in self.param_groups], grad_factor)

    def _step_by_op(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        grad_factor: float,
    ) -> None:
        lists = ([state[name] for state in states if name in state] for name in ("exp_avg", "exp_avg_absmax"))
        torch.ops.qlora_native.lion_step(params, grads, *lists, *self._options(group), grad_factor)
