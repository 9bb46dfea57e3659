"""What an optimizer keeps from step to step for the native code, on whatever device."""

from __future__ import annotations

import operator
from array import array
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native.ops._cuda_optim import DeviceTable
from qlora_native.ops._tensor_rows import GRAD, PARAM, row_of, table_of


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the very tensor; any other tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


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
                row_of(
                    part,
                    part,
                    state["exp_avg"],
                    state.get("exp_avg_sq"),
                    state.get("exp_avg_absmax"),
                    state.get("exp_avg_sq_absmax"),
                    state.get("step"),
                    group,
                )
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
