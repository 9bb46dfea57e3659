"""adamw_step: one step of AdamW or Adam over a list of tensors, in place.

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr decay) - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

with g = grad_factor * gradient, and for Adam (not ``decoupled``) g + decay p in its place and no factor of p.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_native import reference
from qlora_native.ops._optim import Step, check_lists, check_states, define

OP = "adamw_step"


def read(*arguments: Any) -> Step:
    """The op's call; refuses lists that do not fit together."""
    step = Step._make((*arguments[:7], arguments[7:-1], arguments[-1]))
    params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, *_ = step
    check_lists(OP, params, grads)
    check_states(OP, params, exp_avgs, exp_avg_absmaxes, torch.int8, "exp_avg")
    check_states(OP, params, exp_avg_sqs, exp_avg_sq_absmaxes, torch.uint8, "exp_avg_sq")
    if len(exp_avg_absmaxes) != len(exp_avg_sq_absmaxes):
        raise ValueError(f"{OP}: only one of the two moments has absmaxes: expected both or none.")
    fits = (
        count.dtype == torch.float32 and count.numel() == 1 and count.device == param.device
        for count, param in zip(steps, params)  # noqa: B905 - the lengths are compared beside it
    )
    if len(steps) != len(params) or not all(fits):
        raise ValueError(f"{OP}: expected {len(params)} step counters, float32 [] each, beside the parameters.")
    beta1, beta2 = step.options[1:3]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"{OP}: beta1 is {beta1}, beta2 {beta2}: expected 0 or more, and less than 1.")
    return step


def update(step: Step, number: int) -> None:
    """The reference on one parameter."""
    options = dict(zip(("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled"), step.options, strict=True))
    tensors = step.params[number], step.grads[number], *step.states(number)
    reference.adamw_step(*tensors, **options, grad_factor=step.grad_factor)


anywhere = define(OP, read, update)
