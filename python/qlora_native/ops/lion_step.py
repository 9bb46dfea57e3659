"""lion_step: one step of Lion over a list of tensors, in place."""

from __future__ import annotations

import torch

from .. import _C, reference
from . import _cuda_kernels
from ._cuda_optim import LION, DeviceTable, Scaling
from ._library import fake, implement
from ._tensor_rows import Plain, address_of, check_lists, check_states, on_one_device, row_of, table_of

Tensors = list[torch.Tensor]
OP = "lion_step"


def check(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_absmaxes: Tensors) -> None:
    """Refuses lists that do not fit together."""
    check_lists(OP, params, grads)
    check_states(OP, params, exp_avgs, exp_avg_absmaxes, torch.int8, "exp_avg")


def rows_of(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_absmaxes: Tensors
) -> tuple[list[Plain], list[list[int]]]:
    """The tensors that the rows point to, to be kept and at last to be ``done()``, and the rows."""
    plain = [Plain(param, grad) for param, grad in zip(params, grads, strict=True)]
    absmaxes: list[torch.Tensor | None] = [*exp_avg_absmaxes] or [None] * len(params)
    rows = [
        row_of(p.param, p.grad, m, None, absmax, None, None)
        for p, m, absmax in zip(plain, exp_avgs, absmaxes, strict=True)
    ]
    return plain, rows


@implement(OP, "CPU")
def cpu(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_absmaxes)
    if any(param.dtype != grad.dtype for param, grad in zip(params, grads, strict=True)):
        anywhere(params, grads, exp_avgs, exp_avg_absmaxes, lr, beta1, beta2, weight_decay, grad_factor)
        return
    plain, rows = rows_of(params, grads, exp_avgs, exp_avg_absmaxes)
    table = table_of(rows)
    _C.lion_step(address_of(table), len(rows), [(lr, beta1, beta2, weight_decay)], grad_factor)
    for p in plain:
        p.done()


@implement(OP, "CUDA")
def cuda(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_absmaxes)
    module = _cuda_kernels.native()
    if module is None or not on_one_device(params, grads):
        anywhere(params, grads, exp_avgs, exp_avg_absmaxes, lr, beta1, beta2, weight_decay, grad_factor)
        return
    plain, rows = rows_of(params, grads, exp_avgs, exp_avg_absmaxes)
    table = table_of(rows)
    options = [(lr, beta1, beta2, weight_decay)]
    DeviceTable(module, LION, table, len(rows), params[0].device).step(table, options, Scaling(grad_factor))
    for p in plain:
        p.done()


@implement(OP, "CompositeExplicitAutograd")
def anywhere(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_absmaxes)
    for i, param in enumerate(params):
        reference.lion_step(
            param,
            grads[i],
            exp_avgs[i],
            exp_avg_absmaxes[i] if exp_avg_absmaxes else None,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            grad_factor=grad_factor,
        )


@fake(OP)
def shapes(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_absmaxes)
