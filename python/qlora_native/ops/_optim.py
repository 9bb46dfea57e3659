"""What the optimizers' ops share: the table of tensors that the native functions read, what an optimizer keeps of it
from step to step, and the kernels of an op."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import _C, _native
from qlora_native.ops._library import fake, implement, part_of

if TYPE_CHECKING:
    from qlora_native.ops._cuda_optim import DeviceTable

Tensors = list[Tensor]

# Columns of a row, as in cpp/python/tensor_rows.h.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EXP_AVG_ABSMAX, EXP_AVG_SQ_ABSMAX, STEP, NUMEL, DTYPE, GROUP = range(
    _C.optim_row_length
)
STATES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "step")  # of a parameter, by name


def row_of(param: Tensor, grad: Tensor, states: Iterable[Tensor | None], group: int = 0) -> list[int]:
    """One row, with the parameter's states in the order of ``STATES``.

    All tensors are contiguous and on one device, grad of param's dtype; the caller keeps them alive.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (param, grad, *states)]
    return [*addresses, param.numel(), _native.DTYPE_NUMBER[param.dtype], group]


def table_of(rows: Sequence[Sequence[int]]) -> array[int]:
    """Rows one after another, int64 [len(rows) * row length]."""
    return array("q", chain.from_iterable(rows))


def address_of(table: array[int]) -> int:
    """Where a table stands, for the native call."""
    return table.buffer_info()[0]


def check_lists(op: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Refuses lists that do not fit together, tensor by tensor."""
    if len(params) != len(grads):
        raise ValueError(f"{op}: {len(params)} parameters, but {len(grads)} gradients: expected as many.")
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.dtype not in _native.DTYPE_NUMBER:
            raise ValueError(
                f"{op}: parameter {number} is {param.dtype}: expected float32, bfloat16 or float16; "
                "convert the model, or leave the parameter to torch.optim."
            )
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"{op}: parameter {number} is {list(param.shape)} on {param.device}, its gradient {list(grad.shape)} "
                f"on {grad.device}: expected the same."
            )


def check_states(
    op: str,
    params: Sequence[Tensor],
    states: Sequence[Tensor],
    absmaxes: Sequence[Tensor],
    codes: torch.dtype,
    name: str,
) -> None:
    """Refuses states that are neither fp32 without absmax nor ``codes`` with one fp32 absmax a block."""
    if len(states) != len(params) or len(absmaxes) not in (0, len(params)):
        raise ValueError(
            f"{op}: {len(params)} parameters, but {len(states)} tensors {name} and {len(absmaxes)} of its absmax: "
            "expected one each, and no absmax for 32-bit states."
        )
    dtype = codes if absmaxes else torch.float32
    for number, (param, state) in enumerate(zip(params, states, strict=True)):
        blocks = -(-param.numel() // _native.STATE_BLOCK)
        absmax = absmaxes[number] if absmaxes else None
        fits = state.dtype == dtype and state.shape == param.shape and state.is_contiguous()
        if absmax is not None:
            fits = fits and absmax.dtype == torch.float32 and absmax.numel() == blocks and absmax.is_contiguous()
            fits = fits and absmax.device == param.device
        if not fits or state.device != param.device:
            beside = "" if absmax is None else f" with an absmax of {absmax.dtype} {list(absmax.shape)}"
            wanted = "" if absmax is None else f" with an absmax of float32 [{blocks}]"
            raise ValueError(
                f"{op}: {name} {number} is {state.dtype} {list(state.shape)} on {state.device}{beside}: expected "
                f"contiguous {dtype} {list(param.shape)} on {param.device}{wanted}."
            )


def check_steps(op: str, params: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Refuses step counters that are not one fp32 number each."""
    if len(steps) != len(params) or any(step.dtype != torch.float32 or step.numel() != 1 for step in steps):
        raise ValueError(f"{op}: expected {len(params)} step counters, float32 [] each.")


def on_one_device(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether the native kernels take these at once: one device, and each gradient of its parameter's dtype."""
    return len({param.device for param in params}) == 1 and all(
        param.dtype == grad.dtype for param, grad in zip(params, grads, strict=True)
    )


class Plain:
    """A parameter and its gradient as the native code takes them: contiguous, of one dtype. ``done`` writes back."""

    def __init__(self, param: Tensor, grad: Tensor) -> None:
        self.original = param
        self.param = param.contiguous()
        self.grad = grad.contiguous()

    def done(self) -> None:
        if self.param is not self.original:
            self.original.copy_(self.param)


class Plan:
    """What stays from step to step: the parameters that have a gradient, their states, and their rows for the native
    code, of which only the addresses of parameters and gradients are written anew."""

    def __init__(self, params: list[Tensor], groups: list[int], states: list[dict[str, Any]]) -> None:
        self.params, self.groups, self.states = params, groups, states
        self.parts = list(map(part_of, params))
        self.kept = self._values()  # keeps the tensors behind the addresses alive
        self.dtypes = [param.dtype for param in params]
        self.devices = {value.device for value in self.kept if isinstance(value, Tensor)}
        self.on_device: DeviceTable | None = None
        self.numbers: array[int] | None = None  # of the parameters in their page stores, once they are asked for
        self.table: array[int] = table_of(
            [
                row_of(part, part, map(state.get, STATES), group)
                for part, group, state in zip(self.parts, groups, states, strict=True)
            ]
        )

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.states)))

    def still_holds(self, params: list[Tensor], groups: list[int]) -> bool:
        """Whether these are the parameters, and their states the tensors, that the rows were made of."""
        values = self._values()
        return (
            groups == self.groups
            and len(values) == len(self.kept)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, map(part_of, params), self.parts))
            and all(map(operator.is_, values, self.kept))
        )

    def point_at(self, grads: list[Tensor], device: torch.device) -> bool:
        """Writes the addresses of this step. False if a tensor is not on the device and as the native code takes
        them."""
        parts = self.parts
        fits = (
            all(map(Tensor.is_contiguous, grads))
            and all(map(Tensor.is_contiguous, parts))
            and [grad.dtype for grad in grads] == self.dtypes
            and self.devices == {device}
            and all(part.device == device for part in parts)
        )
        if fits:
            length = _C.optim_row_length
            self.table[PARAM::length] = array("q", map(Tensor.data_ptr, parts))
            self.table[GRAD::length] = array("q", map(Tensor.data_ptr, grads))
        return fits


class Step(NamedTuple):
    """A checked call: lists of a tensor for each parameter, empty where there is no such thing."""

    params: Tensors
    grads: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    exp_avg_absmaxes: Tensors
    exp_avg_sq_absmaxes: Tensors
    steps: Tensors
    options: tuple[Any, ...]  # a row of them, as the native functions take it
    grad_factor: float

    def states(self, number: int) -> tuple[Any, ...]:
        """Of one parameter: both moments, their absmaxes and the count of steps."""
        others = (self.exp_avg_sqs, self.exp_avg_absmaxes, self.exp_avg_sq_absmaxes, self.steps)
        exp_avg_sq, absmax, sq_absmax, count = (tensors[number] if tensors else None for tensors in others)
        return self.exp_avgs[number], exp_avg_sq, absmax, sq_absmax, count

    def rows(self) -> tuple[list[Plain], list[list[int]]]:
        """The tensors that the rows point to, to be kept and at last to be ``done()``, and the rows."""
        plain = [Plain(param, grad) for param, grad in zip(self.params, self.grads, strict=True)]
        return plain, [row_of(p.param, p.grad, self.states(number)) for number, p in enumerate(plain)]


def define(op: str, read: Callable[..., Step], update: Callable[[Step, int], None]) -> Callable[..., None]:
    """Registers the op's kernels and its fake.

    ``read`` makes a step of the op's arguments and refuses what does not fit; ``update`` takes it for one parameter, in
    plain torch. Returns the kernel that runs anywhere.
    """

    @implement(op, "CompositeExplicitAutograd")
    def anywhere(*arguments: Any) -> None:
        step = read(*arguments)
        for number in range(len(step.params)):
            update(step, number)

    @implement(op, "CPU")
    def cpu(*arguments: Any) -> None:
        step = read(*arguments)
        if any(param.dtype != grad.dtype for param, grad in zip(step.params, step.grads, strict=True)):
            anywhere(*arguments)  # the kernels read a gradient in its parameter's dtype
            return
        plain, rows = step.rows()
        table = table_of(rows)
        getattr(_C, op)(address_of(table), len(rows), [step.options], step.grad_factor)
        for p in plain:
            p.done()

    @implement(op, "CUDA")
    def cuda(*arguments: Any) -> None:
        from qlora_native.ops import _cuda_kernels
        from qlora_native.ops._cuda_optim import DeviceTable, Scaling

        step = read(*arguments)
        module = _cuda_kernels.native()
        if module is None or not on_one_device(step.params, step.grads):
            anywhere(*arguments)
            return
        device = step.params[0].device
        counts = [count.to(device) for count in step.steps]  # the same tensors where they stand there
        plain, rows = step._replace(steps=counts).rows()
        table = table_of(rows)
        DeviceTable(module, op, table, len(rows), device).step(table, [step.options], Scaling(step.grad_factor))
        for p in plain:
            p.done()
        for own, count in zip(step.steps, counts, strict=True):
            if count is not own:
                own.copy_(count)

    @fake(op)
    def shapes(*arguments: Any) -> None:
        read(*arguments)

    return anywhere
