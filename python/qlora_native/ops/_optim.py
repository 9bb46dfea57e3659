"""What the optimizers' ops share: the table of tensors that the native functions read, and the kernels of an op."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora_native import _C, _native
from qlora_native._native import GRAD, PARAM
from qlora_native.ops._library import Values, fake, implement
from qlora_native.ops._operands import part_of

if TYPE_CHECKING:
    from qlora_native.ops._cuda_optim import DeviceTable

Tensors = list[Tensor]

STATES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "step")  # of a parameter, by name


def row_of(param: Tensor, grad: Tensor, states: Iterable[Tensor | None], group: int = 0) -> list[int]:
    """One row, states in the order of ``STATES``; all contiguous, on one device, and kept alive by the caller."""
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
        if (
            grad.shape != param.shape
            or grad.device != param.device
            or not grad.is_floating_point()
            or {param.layout, grad.layout} != {torch.strided}
        ):
            raise ValueError(
                f"{op}: parameter {number} is {list(param.shape)} on {param.device}, its gradient {list(grad.shape)} "
                f"on {grad.device}, {grad.dtype}, {grad.layout}: expected the same shape and device, a floating-point "
                "dtype, and both dense."
            )


def check_states(op: str, params: Tensors, states: Tensors, absmaxes: Tensors, codes: torch.dtype, name: str) -> None:
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
            fits = fits and absmax.dtype == torch.float32 and absmax.shape == (blocks,) and absmax.is_contiguous()
            fits = fits and absmax.device == param.device
        if not fits or state.device != param.device:
            beside = "" if absmax is None else f" with an absmax of {absmax.dtype} {list(absmax.shape)}"
            wanted = "" if absmax is None else f" with an absmax of float32 [{blocks}]"
            raise ValueError(
                f"{op}: {name} {number} is {state.dtype} {list(state.shape)} on {state.device}{beside}: expected "
                f"contiguous {dtype} {list(param.shape)} on {param.device}{wanted}."
            )


def check_state_sizes(number: int, part: Tensor, state: dict[str, Any]) -> None:
    """Refuses states of a parameter, by name, that do not hold a value for each element of the rank's part of it."""
    for name, value in state.items():
        if name not in STATES:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"optimizer: the state {name} of parameter {number} is {value!r}: expected a tensor.")
        coded = f"{name.removesuffix('_absmax')}_absmax" in state
        dtypes: tuple[torch.dtype, ...] = (torch.float32,)
        if name == "step":
            count = 1
        elif name.endswith("_absmax"):
            count = -(-part.numel() // _native.STATE_BLOCK)
        else:
            count = part.numel()
            dtypes = (torch.int8, torch.uint8) if coded else dtypes
        if value.numel() != count or value.dtype not in dtypes or not value.is_contiguous():
            raise ValueError(
                f"optimizer: parameter {number} is {list(part.shape)}, its state {name} {value.dtype} "
                f"{list(value.shape)}: expected {count} contiguous {' or '.join(map(str, dtypes))} values; a parameter "
                "that was given other data needs a new optimizer."
            )


class Plan:
    """What stays from step to step: the parameters that have a gradient, their states, and their rows for the native
    code, of which only the addresses of parameters and gradients are written anew."""

    def __init__(self, params: list[Tensor], groups: list[int], states: list[dict[str, Any]]) -> None:
        self.params = params
        self.groups = groups
        self.states = states
        self.parts = list(map(part_of, params))
        self.kept = self._values()  # keeps the tensors behind the addresses alive
        self.dtypes = [part.dtype for part in self.parts]
        self.numels = list(map(Tensor.numel, self.parts))
        for number, (part, state) in enumerate(zip(self.parts, states, strict=True)):
            check_state_sizes(number, part, state)
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
            and list(map(Tensor.numel, self.parts)) == self.numels  # `param.data = other` keeps the parameter
            and [part.dtype for part in self.parts] == self.dtypes
        )

    def point_at(self, grads: list[Tensor], device: torch.device) -> bool:
        """Writes this step's addresses. False if a tensor is not on the device and as the native code takes it."""
        parts = self.parts
        fits = (
            all(map(Tensor.is_contiguous, (*grads, *parts)))
            and list(map(Tensor.numel, grads)) == self.numels
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
    options: Values  # a row of them, as the native functions take it
    grad_factor: float

    def states(self, number: int) -> Values:
        """Of one parameter: both moments, their absmaxes and the count of steps."""
        others = (self.exp_avg_sqs, self.exp_avg_absmaxes, self.exp_avg_sq_absmaxes, self.steps)
        exp_avg_sq, absmax, sq_absmax, count = (tensors[number] if tensors else None for tensors in others)
        return self.exp_avgs[number], exp_avg_sq, absmax, sq_absmax, count

    def table(self) -> tuple[Tensors, Tensors, array[int]]:
        """Contiguous parameters and gradients, to be kept while the native code runs, and the rows that point to them.

        The parameters are to be written back by :func:`copy_back`.
        """
        params, grads = ([tensor.contiguous() for tensor in tensors] for tensors in (self.params, self.grads))
        pairs = enumerate(zip(params, grads, strict=True))
        return params, grads, table_of([row_of(param, grad, self.states(number)) for number, (param, grad) in pairs])


def copy_back(originals: Tensors, copies: Tensors) -> None:
    """Writes the copies that are not their originals to them."""
    for original, copy in zip(originals, copies, strict=True):
        if copy is not original:
            original.copy_(copy)


def define(op: str, read: Callable[..., Step], update: Callable[[Step, int], None]) -> Callable[..., None]:
    """Registers the op's kernels and its fake; returns the kernel that runs anywhere.

    ``read`` makes a step of the op's arguments and refuses what does not fit; ``update`` takes it for one parameter.
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
        params, _grads, table = step.table()
        getattr(_C, op)(address_of(table), len(params), [step.options], step.grad_factor)
        copy_back(step.params, params)
        increment_version(step.params)

    @implement(op, "CUDA")
    def cuda(*arguments: Any) -> None:
        from qlora_native.ops import _cuda_kernels
        from qlora_native.ops._cuda_optim import DeviceTable, Scaling

        step = read(*arguments)
        dtypes_fit = all(p.dtype == g.dtype for p, g in zip(step.params, step.grads, strict=True))
        devices = list({param.device for param in step.params})
        module = _cuda_kernels.native(devices[0]) if len(devices) == 1 else None
        if module is None or not dtypes_fit:
            anywhere(*arguments)
            return
        device = devices[0]
        steps = [count.to(device) for count in step.steps]  # the same tensors where they stand there
        params, _grads, table = step._replace(steps=steps).table()
        DeviceTable(module, op, table, len(params), device).step(table, [step.options], Scaling(step.grad_factor))
        copy_back(step.params, params)
        increment_version(step.params)
        copy_back(step.steps, steps)

    @fake(op)
    def shapes(*arguments: Any) -> None:
        read(*arguments)

    return anywhere
