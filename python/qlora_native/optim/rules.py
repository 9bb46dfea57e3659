"""The update rules: AdamW, Adam and Lion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qlora_native.optim.base import Optimizer
from qlora_native.optim.paging import Paged


class AdamW(Optimizer):
    """Adam with decoupled weight decay; the update of ``torch.optim.AdamW`` (Loshchilov and Hutter 2019).

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer.
        lr: learning rate.
        betas: decay of the two averages.
        eps: added to the denominator.
        weight_decay: each step first multiplies the parameter by ``1 - lr * weight_decay``.
        bits: 32, or 8 for coded states; a group may have its own.
        paged: "auto" keeps the states in memory until it runs short; then they go into a page file, and come back when
            there is room again. True keeps them in the file from the start, False in memory always.
        page_dir: folder of the page file, on a disk; by default that for temporary files, or /var/tmp if that lies in
            memory. The file has no name, and its space is free again when the process ends, however it ends.
        page_budget: bytes of the states that may be in memory while they are in the file, at least 1 MiB (256 pages);
            by default half of what is free at a step.
        max_norm: clips the norm of all gradients together; see the module's text.

    Raises:
        OSError: ``paged`` is True and there can be no page file.
        ValueError: values out of range, parameters that are not float32, bfloat16 or float16, or, in ``step``, sparse
            gradients.
    """

    _moments: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
    _counts_steps = True
    _op = "adamw_step"
    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: Literal[8, 32] = 32,
        paged: Paged = "auto",
        page_dir: str | Path | None = None,
        *,
        page_budget: int | None = None,
        max_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits}
        super().__init__(params, defaults, paged, page_dir, page_budget, max_norm)

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        return *map(float, numbers), self._decoupled


class Adam(AdamW):
    """Adam (Kingma and Ba 2015); the update of ``torch.optim.Adam``: ``weight_decay`` is added to the gradient.

    Arguments as for :class:`AdamW`.
    """

    _decoupled = False


class Lion(Optimizer):
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"): one average, and steps of ``lr`` in the
    direction of ``sign(beta1 * average + (1 - beta1) * gradient)``.

    Its authors advise a learning rate 3 to 10 times smaller than AdamW's, with a weight decay as much larger. Arguments
    as for :class:`AdamW`.
    """

    _moments: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8}
    _counts_steps = False
    _op = "lion_step"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        bits: Literal[8, 32] = 32,
        paged: Paged = "auto",
        page_dir: str | Path | None = None,
        *,
        page_budget: int | None = None,
        max_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "bits": bits}
        super().__init__(params, defaults, paged, page_dir, page_budget, max_norm)

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(map(float, (group["lr"], *group["betas"], group["weight_decay"])))
