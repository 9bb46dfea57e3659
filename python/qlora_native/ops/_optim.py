"""What the optimizers' ops share: the table of tensors that the native functions read, and the kernels of an op."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora_native import _C, reference
from qlora_native._native import DTYPE_NUMBER, GRAD, PARAM, STATE_BLOCK
from qlora_native.ops._library import PARAMETERS, Values, fake, implement
from qlora_native.ops._operands import part_of

if TYPE_CHECKING:
    from qlora_native.ops._cuda_optim import DeviceTable

# Of a parameter: tensors by the names of STATES, absmaxes beside codes alone.
State = Mapping[str, Any]
STATES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "step")
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}  # with an absmax beside them


def row_of(param: Tensor, grad: Tensor, state: State, group: int = 0) -> list[int]:
    """One row of the table; tensors are contiguous, on one device, and kept alive by the caller."""
    addresses = [
        0 if tensor is None else tensor.data_ptr() for tensor in (param, grad, *map(state.get, STATES))
    ]
    return [*addresses, param.numel(), DTYPE_NUMBER[param.dtype], group]


def table_of(rows: Sequence[Sequence[int]]) -> array[int]:
    """Rows one after another, int64 [len(rows) * row length]."""
    return array("q", chain.from_iterable(rows))


def address_of(table: array[int]) -> int:
    """Where a table stands, for the native call."""
    return table.buffer_info()[0]


def check_state(owner: str, number: int, part: Tensor, state: State, is_flat: bool = True) -> None:
    """Refuses a state that does not hold a value for each element of the rank's part of a parameter.

    Unless ``is_flat`` its tensors have to be of the parameter's shape and on its device as well.
    """
    for name, value in state.items():
        if name not in STATES:
            continue
        dtype = CODES[name] if f"{name}_absmax" in state else torch.float32
        shape = part.shape
        if name == "step":
            shape = torch.Size()
        elif name.endswith("_absmax"):
            shape = torch.Size([-(-part.numel() // STATE_BLOCK)])
        fits = isinstance(value, Tensor) and value.dtype == dtype and value.numel() == shape.numel()
        fits = fits and value.is_contiguous() and (is_flat or value.device == part.device)
        if not fits or not (is_flat or value.shape == shape or name == "step"):
            given = (
                f"{value.dtype} {list(value.shape)} on {value.device}"
                if isinstance(value, Tensor)
                else repr(value)
            )
            raise ValueError(
                f"{owner}: parameter {number} is {list(part.shape)}, its state {name} {given}: expected contiguous "
                f"{dtype} {list(shape)} on {part.device}; a parameter that was given other data needs a new optimizer."
            )


class StepTable:
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
            check_state("optimizer", number, part, state)
        self.devices = {value.device for value in self.kept if isinstance(value, Tensor)}
        self.on_device: DeviceTable | None = None
        # Of the parameters in their page stores, once they are asked for.
        self.numbers: array[int] | None = None
        rows = zip(self.parts, self.parts, states, groups, strict=True)
        self.rows: array[int] = table_of([row_of(*row) for row in rows])

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
            and list(map(Tensor.numel, self.parts))
            == self.numels  # `param.data = other` keeps the parameter
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
            self.rows[PARAM::length] = array("q", map(Tensor.data_ptr, parts))
            self.rows[GRAD::length] = array("q", map(Tensor.data_ptr, grads))
        return fits


def define(op: str, names: Sequence[str]) -> Callable[..., None]:
    """Registers the op's kernels and its fake; returns the kernel that runs anywhere.

    ``names``: of the states whose lists, one tensor a parameter, the op takes after parameters and gradients.
    """
    count = 2 + len(names)

    def read(arguments: Values) -> tuple[list[Tensor], list[Tensor], list[State], dict[str, Any]]:
        """Parameters, gradients, a state for each, and options by name; refuses what does not fit together."""
        params, grads, *lists = arguments[:count]
        options = dict(zip(PARAMETERS[op][count:], arguments[count:], strict=True))
        is_coded = bool(lists[names.index("exp_avg_absmax")])
        for name, tensors in zip(PARAMETERS[op][:count], arguments[:count], strict=True):
            expected = len(params) if is_coded or not name.endswith("absmaxes") else 0
            if len(tensors) != expected:
                raise ValueError(
                    f"{op}: {len(params)} params, but {len(tensors)} {name}: expected {expected}."
                )
        betas = options["beta1"], options["beta2"]
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"{op}: beta1 and beta2 are {betas}: expected 0 or more, and less than 1."
            )
        held = [name for name, tensors in zip(names, lists, strict=True) if tensors]
        stored = zip(*filter(None, lists), strict=True)
        states: list[State] = [dict(zip(held, tensors, strict=True)) for tensors in stored]
        for number, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
            _check_gradient(op, number, param, grad)
            check_state(op, number, param, state, is_flat=False)
        return params, grads, states, options

    @implement(op, "CompositeExplicitAutograd")
    def anywhere(*arguments: Any) -> None:
        params, grads, states, options = read(arguments)
        for param, grad, state in zip(params, grads, states, strict=True):
            getattr(reference, op)(param, grad, *map(state.get, names), **options)

    def natively(arguments: Values, step: Callable[..., None]) -> None:
        """By ``step(table, number of parameters, a row of options, factor of the gradients)``."""
        params, grads, states, options = read(arguments)
        if any(param.dtype != grad.dtype for param, grad in zip(params, grads, strict=True)):
            anywhere(*arguments)  # the kernels read a gradient in its parameter's dtype
            return
        copies = [param.contiguous() for param in params]
        grads = [grad.contiguous() for grad in grads]  # kept while the native code runs
        *row, factor = options.values()
        step(table_of(list(map(row_of, copies, grads, states))), len(params), [tuple(row)], factor)
        for param, copy in zip(params, copies, strict=True):
            if copy is not param:
                param.copy_(copy)
        increment_version(params)

    @implement(op, "CPU")
    def cpu(*arguments: Any) -> None:
        natively(arguments, lambda table, *others: getattr(_C, op)(address_of(table), *others))

    @implement(op, "CUDA")
    def cuda(*arguments: Any) -> None:
        from qlora_native.ops import _cuda_kernels
        from qlora_native.ops._cuda_optim import DeviceTable, Scaling

        devices = list({param.device for param in arguments[0]})
        module = _cuda_kernels.native(devices[0]) if len(devices) == 1 else None
        if module is None:
            anywhere(*arguments)
            return

        def step(
            table: array[int], num_tensors: int, options: list[Values], grad_factor: float
        ) -> None:
            DeviceTable(module, op, table, num_tensors, *devices).step(
                table, options, Scaling(grad_factor)
            )

        natively(arguments, step)

    @fake(op)
    def shapes(*arguments: Any) -> None:
        read(arguments)

    return anywhere


def _check_gradient(op: str, number: int, param: Tensor, grad: Tensor) -> None:
    if param.dtype not in DTYPE_NUMBER:
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
