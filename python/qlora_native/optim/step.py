"""One step of an optimizer over all parameters; ``states`` has what it is built from and its states.

The ops ``adamw_step`` and ``lion_step`` are for others: a step calls the native functions behind them itself, over
tables of addresses that are kept between steps.

Parameters may be sharded over ranks (DTensors, as FSDP2 makes them): each rank updates its own part; the norm of the
gradients is that of whole parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native.ops import _library
from qlora_native.ops._operands import is_sharded, part_of
from qlora_native.ops._optim import StepTable, address_of
from qlora_native.optim.paging import HostPages, is_coded
from qlora_native.optim.states import PagedOptimizer


class Optimizer(PagedOptimizer):
    """Base class of AdamW, Adam and Lion, which name their op and what it takes beside the options of a group."""

    # GradScaler leaves unscaling and skipping to step(), by way of the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True
    _op: ClassVar[str]
    _flags: ClassVar[tuple[bool, ...]] = ()
    _grad_norm: float | Tensor | None = None
    _skipped: bool | Tensor = False

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; None without ``max_norm``."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def skipped(self) -> bool:
        """The last step changed nothing, because a gradient was not finite."""
        return bool(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._alone():
            self._step()
        # Kernels write parameters as autograd does not see.
        torch.autograd.graph.increment_version([param for param, _ in self._placed()])
        return loss

    def write_options(self) -> None:
        """Writes the options of the groups, such as ``lr``, where a step that a CUDA graph holds reads them.

        To be called before a replay when they have changed, and before the capture. Not in the graph: ``max_norm``,
        and which parameters have a gradient, are those of the capture. Does nothing on a CPU.
        """
        if self._table is not None and self._table.on_device is not None:
            self._table.on_device.write_options(self._options())

    def _options(self) -> list[tuple[Any, ...]]:
        """The options of each group in the order of the op's arguments."""
        names = [name for name in ("eps", "weight_decay") if name in self.defaults]
        return [
            (
                *map(float, (group["lr"], *group["betas"], *(group[name] for name in names))),
                *self._flags,
            )
            for group in self.param_groups
        ]

    def _step(self) -> None:
        self._grad_norm = None
        self._skipped = False
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        table, grads = self._table_and_gradients()
        if table is None:
            return
        sharded = self.max_norm is not None and any(map(is_sharded, table.params))
        norm = whole_norm(table.params, grads) if sharded else None
        if not sharded and self._step_on_device(
            table, grads, 1.0, self.max_norm, grad_scale, found_inf
        ):
            return
        if found_inf is not None and float(found_inf) != 0:
            self._skipped = True
            return
        native = table.point_at(grads, torch.device("cpu"))
        factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        if self.max_norm is not None:
            if norm is None and native:
                norm = _C.gradient_norm(address_of(table.rows), len(grads))
            self._grad_norm = norm = factor * (
                whole_norm(table.params, grads) if norm is None else norm
            )
            if not math.isfinite(norm):
                self._skipped = True
                return
            factor *= min(1.0, self.max_norm / (norm + 1e-6))
        if native:
            self._step_natively(table, factor)
        elif not sharded or not self._step_on_device(table, grads, factor):
            self._step_by_ops(table, grads, factor)

    def _table_and_gradients(self) -> tuple[StepTable | None, list[Tensor]]:
        """The last step's table, or a new one with states for parameters that had none; this rank's gradients. None
        where no parameter has a gradient."""
        groups = enumerate(self.param_groups)
        found = [
            (p, number) for number, group in groups for p in group["params"] if p.grad is not None
        ]
        params, numbers = [param for param, _ in found], [number for _, number in found]
        grads: list[Any] = [param.grad for param in params]
        if odd := {grad.layout for grad in grads} - {torch.strided}:
            raise ValueError(
                f"{type(self).__name__}: a gradient is {odd.pop()}: expected dense ones; build the embedding with "
                "sparse=False, or give its parameter to torch.optim.SparseAdam."
            )
        if not params:
            return None, []
        for pages in self._pages.values():
            if pages.could_pin and pages.is_short():
                pages.pin(self._pinnable(pages))
        if self._table is None or not self._table.still_holds(params, numbers):
            if not all(self.state[param] for param in params):
                self._reserve()
            for param, number in found:
                if not self.state[param]:
                    self.state[param] = self._new_state(param, self.param_groups[number])
            self._table = StepTable(params, numbers, [self.state[param] for param in params])
        return self._table, list(map(part_of, grads))

    def _step_on_device(
        self,
        table: StepTable,
        grads: list[Tensor],
        grad_factor: float,
        max_norm: float | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> bool:
        """Launch the step, if all tensors are on one CUDA device in the form its kernels take; waits for nothing."""
        device = table.params[0].device
        module = _library.module_for(device)
        if module is None:
            return False
        pages = self._pages.get(device)
        is_paged = pages is not None and pages.holds(table)
        if not table.point_at(grads, device):
            return False
        from qlora_native.ops._cuda_optim import DeviceTable, Scaling

        if table.on_device is None:
            table.on_device = DeviceTable(module, self._op, table.rows, len(grads), device)
        scale, skip = (
            None if t is None else t.to(device, torch.float32) for t in (grad_scale, found_inf)
        )
        by = Scaling(grad_factor, max_norm, scale, skip)
        if pages is not None and is_paged:
            pages.step(table, self._options(), by)
        else:
            table.on_device.step(table.rows, self._options(), by)
        if max_norm is not None:
            self._grad_norm = table.on_device.grad_norm
        if max_norm is not None or found_inf is not None:
            self._skipped = table.on_device.skipped
        return True

    def _step_natively(self, table: StepTable, grad_factor: float) -> None:
        pager: tuple[_C.Pager | None, int, int] = (None, 0, 0)
        if isinstance(pages := self._pages.get(torch.device("cpu")), HostPages):
            pager = pages.pager, address_of(pages.numbers(table)), pages.budget_now()
        getattr(_C, self._op)(
            address_of(table.rows), len(table.params), self._options(), grad_factor, *pager
        )

    def _step_by_ops(self, table: StepTable, grads: list[Tensor], grad_factor: float) -> None:
        """The same step, one op for each group, device and form of the states."""
        calls: dict[tuple[int, torch.device, bool], list[int]] = {}
        for i, (param, number, state) in enumerate(
            zip(table.params, table.groups, table.states, strict=True)
        ):
            calls.setdefault((number, param.device, is_coded(state)), []).append(i)
        for (number, _, _), chosen in calls.items():
            states = [table.states[i] for i in chosen]
            lists = ([state[name] for state in states if name in state] for name in self._tensors)
            params, chosen_grads = ([tensors[i] for i in chosen] for tensors in (table.parts, grads))
            call = getattr(torch.ops.qlora_native, self._op)
            call(params, chosen_grads, *lists, *self._options()[number], grad_factor)
            for pages in self._pages.values():
                pages.keep_within_budget()


def whole_norm(params: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients, of which ``grads`` are this rank's parts: every rank gets the same number."""
    parts: dict[Any, list[Tensor]] = {}  # by device mesh, placements and device
    for param, grad in zip(params, grads, strict=True):
        sharding = (param.device_mesh, param.placements) if is_sharded(param) else (None, ())  # type: ignore[attr-defined]
        parts.setdefault((*sharding, grad.device), []).append(grad)
    total = 0.0
    for (mesh, placements, device), part in parts.items():
        square = torch.tensor(
            float(torch.ops.qlora_native.gradient_norm(part)) ** 2, dtype=torch.float64
        )
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                square = square.to(device)
                torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
        total += float(square)
    return math.sqrt(total)
