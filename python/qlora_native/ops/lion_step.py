"""lion_step: one step of Lion over a list of tensors, in place.

    p = p (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g

with g = grad_factor * gradient; the sign is of m before the step.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_native import reference
from qlora_native.ops._optim import Step, Tensors, check_lists, check_states, define

OP = "lion_step"


def read(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_absmaxes: Tensors, *numbers: Any) -> Step:
    """The op's call; refuses lists that do not fit together."""
    check_lists(OP, params, grads)
    check_states(OP, params, exp_avgs, exp_avg_absmaxes, torch.int8, "exp_avg")
    return Step(params, grads, exp_avgs, [], exp_avg_absmaxes, [], [], numbers[:-1], numbers[-1])


def update(step: Step, number: int) -> None:
    """The reference on one parameter."""
    options = dict(zip(("lr", "beta1", "beta2", "weight_decay"), step.options, strict=True))
    exp_avg, _, absmax, *_ = step.states(number)
    reference.lion_step(
        step.params[number], step.grads[number], exp_avg, absmax, **options, grad_factor=step.grad_factor
    )


anywhere = define(OP, read, update)
