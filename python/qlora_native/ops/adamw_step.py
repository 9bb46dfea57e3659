"""adamw_step: one step of AdamW or Adam over a list of tensors, in place."""

from __future__ import annotations

from typing import Any

import torch

from qlora_native import reference
from qlora_native.ops._optim_step import Step, Tensors, define
from qlora_native.ops._tensor_rows import check_lists, check_states, check_steps

OP = "adamw_step"


def read(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    steps: Tensors,
    *numbers: Any,
) -> Step:
    """The op's call; refuses lists that do not fit together."""
    check_lists(OP, params, grads)
    check_states(OP, params, exp_avgs, exp_avg_absmaxes, torch.int8, "exp_avg")
    check_states(OP, params, exp_avg_sqs, exp_avg_sq_absmaxes, torch.uint8, "exp_avg_sq")
    if len(exp_avg_absmaxes) != len(exp_avg_sq_absmaxes):
        raise ValueError(f"{OP}: only one of the two moments has absmaxes: expected both or none.")
    check_steps(OP, params, steps)
    lists = params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps
    return Step(*lists, options=numbers[:-1], grad_factor=numbers[-1])


def update(step: Step, number: int) -> None:
    """The reference on one parameter."""
    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled")
    exp_avg, _, absmax, sq_absmax, _ = step.states(number)
    reference.adamw_step(
        step.params[number],
        step.grads[number],
        exp_avg,
        step.exp_avg_sqs[number],
        absmax,
        sq_absmax,
        step.steps[number],
        **dict(zip(names, step.options, strict=True)),
        grad_factor=step.grad_factor,
    )


anywhere = define(OP, read, update)
