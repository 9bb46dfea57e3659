"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state to continue on the
same curve."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,  # number of the step about to be taken, counted from 0
    total_steps: int,
    *,
    peak: float,
    warmup: float,  # steps; below 1 a share of total_steps
    scheduler: Literal["cosine", "linear", "constant"],
) -> float:
    """Rises linearly to ``peak`` over the warm-up, then falls to 0 at ``total_steps`` (or stays, for "constant").

    The first step of a warm-up of n steps already has peak / n: a step with a rate of 0 would be wasted.
    """
    warmup_steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if scheduler == "linear":
        return peak * max(0.0, 1 - done)
    return peak
