"""The kernels of an optimizer's op, adamw_step or lion_step, from what tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qlora_native import _C
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._cuda_optim import DeviceTable, Scaling
from qlora_native.ops._library import fake, implement
from qlora_native.ops._tensor_rows import Plain, State, address_of, on_one_device, row_of, table_of

Tensors = list[torch.Tensor]


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

    def states(self, number: int) -> tuple[torch.Tensor, State, State, State, State]:
        """Of one parameter: both moments, their absmaxes and the count of steps."""
        others = (self.exp_avg_sqs, self.exp_avg_absmaxes, self.exp_avg_sq_absmaxes, self.steps)
        exp_avg_sq, absmax, sq_absmax, count = (tensors[number] if tensors else None for tensors in others)
        return self.exp_avgs[number], exp_avg_sq, absmax, sq_absmax, count

    def rows(self) -> tuple[list[Plain], list[list[int]]]:
        """The tensors that the rows point to, to be kept and at last to be ``done()``, and the rows."""
        plain = [Plain(param, grad) for param, grad in zip(self.params, self.grads, strict=True)]
        return plain, [row_of(p.param, p.grad, *self.states(number)) for number, p in enumerate(plain)]


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
