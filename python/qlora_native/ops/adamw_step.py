"""adamw_step: one step of AdamW or Adam over a list of tensors, in place."""

from __future__ import annotations

import torch

from .. import _C, reference
from . import _cuda_kernels
from ._cuda_optim import ADAMW, DeviceTable, Scaling
from ._library import fake, implement
from ._tensor_rows import (
    Plain,
    address_of,
    check_lists,
    check_states,
    check_steps,
    on_one_device,
    row_of,
    table_of,
)

Tensors = list[torch.Tensor]
OP = "adamw_step"


def check(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
) -> None:
    """Refuses lists that do not fit together."""
    check_lists(OP, params, grads)
    check_states(OP, params, exp_avgs, exp_avg_absmaxes, torch.int8, "exp_avg")
    check_states(OP, params, exp_avg_sqs, exp_avg_sq_absmaxes, torch.uint8, "exp_avg_sq")
    if len(exp_avg_absmaxes) != len(exp_avg_sq_absmaxes):
        raise ValueError(f"{OP}: only one of the two moments has absmaxes: expected both or none.")
    check_steps(OP, params, steps)


def rows_of(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
) -> tuple[list[Plain], list[list[int]]]:
    """The tensors that the rows point to, to be kept and at last to be ``done()``, and the rows."""
    plain = [Plain(param, grad) for param, grad in zip(params, grads, strict=True)]
    absmaxes: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * len(params)
    if exp_avg_absmaxes:
        absmaxes = list(zip(exp_avg_absmaxes, exp_avg_sq_absmaxes, strict=True))
    rows = [
        row_of(p.param, p.grad, m, v, *absmax, step)
        for p, m, v, absmax, step in zip(plain, exp_avgs, exp_avg_sqs, absmaxes, steps, strict=True)
    ]
    return plain, rows


@implement(OP, "CPU")
def cpu(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps)
    if any(param.dtype != grad.dtype for param, grad in zip(params, grads, strict=True)):
        # The kernels read a gradient in its parameter's dtype.
        anywhere(
            params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps,
            lr, beta1, beta2, eps, weight_decay, decoupled, grad_factor,
        )  # fmt: skip
        return
    plain, rows = rows_of(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps)
    table = table_of(rows)
    _C.adamw_step(address_of(table), len(rows), [(lr, beta1, beta2, eps, weight_decay, decoupled)], grad_factor)
    for p in plain:
        p.done()


@implement(OP, "CUDA")
def cuda(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps)
    module = _cuda_kernels.native()
    if module is None or not on_one_device(params, grads):
        anywhere(
            params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps,
            lr, beta1, beta2, eps, weight_decay, decoupled, grad_factor,
        )  # fmt: skip
        return
    device = params[0].device
    counts = [step.to(device) for step in steps]  # the same tensors where they stand there
    plain, rows = rows_of(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, counts)
    table = table_of(rows)
    options = [(lr, beta1, beta2, eps, weight_decay, decoupled)]
    DeviceTable(module, ADAMW, table, len(rows), device).step(table, options, Scaling(grad_factor))
    for p in plain:
        p.done()
    for step, count in zip(steps, counts, strict=True):
        if count is not step:
            step.copy_(count)


@implement(OP, "CompositeExplicitAutograd")
def anywhere(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps)
    for i, param in enumerate(params):
        reference.adamw_step(
            param,
            grads[i],
            exp_avgs[i],
            exp_avg_sqs[i],
            exp_avg_absmaxes[i] if exp_avg_absmaxes else None,
            exp_avg_sq_absmaxes[i] if exp_avg_sq_absmaxes else None,
            steps[i],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            grad_factor=grad_factor,
        )


@fake(OP)
def shapes(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_factor: float,
) -> None:
    check(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps)
