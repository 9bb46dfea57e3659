"""adamw_step: one step of AdamW or Adam over a list of tensors, in place.

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr decay) - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

with g = grad_factor * gradient, and for Adam (not ``decoupled``) g + decay p in its place and no factor of p.
"""

from __future__ import annotations

from qlora_native.ops._optim import STATES, define

anywhere = define("adamw_step", STATES)
