"""lion_step: one step of Lion over a list of tensors, in place.

    p = p (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g)        m = beta2 m + (1 - beta2) g

with g = grad_factor * gradient; the sign is of m before the step.
"""

from __future__ import annotations

from qlora_native.ops._optim import define

anywhere = define("lion_step", ("exp_avg", "exp_avg_absmax"))
