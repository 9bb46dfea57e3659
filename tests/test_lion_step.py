"""lion_step against the paper in double precision; what it shares with adamw_step is tested in test_adamw_step.py."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from test_adamw_step import OPTIONS, Lists

pytestmark = [pytest.mark.isa, pytest.mark.devices("cpu", "cuda", "emulated"), pytest.mark.usefixtures("device")]


def test_is_the_paper() -> None:
    """Algorithm 2 of Chen et al. 2023, in double precision. A sign that hangs on the last bit may differ."""
    lists = Lists("lion_step", (5000,))
    w, m = lists["param"][0].double(), torch.zeros(5000, dtype=torch.float64)
    lr, beta1, beta2, decay = OPTIONS["lion_step"].values()
    for _ in range(20):
        lists["grad"] = [torch.randn(5000)]
        g = lists["grad"][0].double()
        update = torch.sign(beta1 * m + (1 - beta1) * g)
        w = w - lr * (update + decay * w)
        m = beta2 * m + (1 - beta2) * g
        lists.call()
    assert ((lists["param"][0] - w).abs() > 1e-5).sum() <= 2
    assert relative_error(lists["exp_avg"][0], m) < 1e-6
