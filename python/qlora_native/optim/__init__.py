"""Optimizers with one native call a step: ``AdamW``, ``Adam`` and ``Lion``, with 32-bit or 8-bit states.

They are ``torch.optim.Optimizer``: learning-rate schedulers, parameter groups, hooks, closures, ``state_dict``,
deepcopy and ``GradScaler`` work as with torch's own. The differences:

* ``max_norm`` clips inside ``step()``: one sweep measures the norm of all gradients, a second one updates with every
  gradient multiplied by ``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` would leave them;
  ``.grad`` itself is not written. ``optimizer.grad_norm`` is the norm before clipping. If it is not finite, nothing is
  updated, no step is counted, and ``optimizer.skipped`` is True until the next step. ``max_norm=math.inf`` measures and
  skips without clipping; without ``max_norm`` there is no first sweep, and what is not finite spreads as in torch.
* ``bits=8`` keeps the moments as 8-bit dynamic codes, each block of 256 elements relative to its largest magnitude
  (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): 2.03 bytes a parameter instead of 8. Tensors
  below 4096 elements keep 32-bit states: they weigh little, and norms and biases are sensitive. A block in which a
  moment overflows becomes NaN as a whole; ``max_norm`` prevents that.
* Parameters may be float32, bfloat16 or float16; the update is computed in float32 and rounded once. States are float32
  or codes, whatever the parameter's dtype.
* On the CPU the bytes written depend neither on the instruction set nor on the number of threads. The CUDA kernels give
  the same bytes in two launches (in the emulator; they have not run on hardware); the host waits for them only where
  ``grad_norm`` or ``skipped`` is read. Elsewhere, and for gradients of another dtype than their parameter's, the plain
  torch reference computes the same, slower.
* ``paged`` states may leave memory: a file takes them, and a step brings them in chunk by chunk, ahead of use, and
  sends them out again. The bytes are the same wherever they are, and so is what ``state_dict`` gives. With "auto" that
  begins when memory runs short and ends when there is room again; ``page_out`` does it at once. ``paging_statistics``
  returns what was moved and what it cost. On a CUDA device managed memory takes them when the device's memory runs
  short; where pages cannot move while kernels run (Windows, WSL2, Tegra), pinned host memory does, from which each step
  copies them, and "auto" stays there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qlora_native.optim.paging import Moments, Paged, PagingStatistics
from qlora_native.optim.step import Optimizer

__all__ = ["Adam", "AdamW", "Lion", "PagingStatistics"]


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
            by default half of what is free at a step. States that fit stay in memory.
        max_norm: clips the norm of all gradients together; see the module's text.

    Raises:
        OSError: ``paged`` is True and there can be no page file.
        ValueError: values out of range, parameters that are not float32, bfloat16 or float16, or, in ``step``, sparse
            gradients.
    """

    _moments: ClassVar[Moments] = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
    _op = "adamw_step"
    _flags = (True,)  # whether weight_decay is decoupled

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


class Adam(AdamW):
    """Adam (Kingma and Ba 2015); the update of ``torch.optim.Adam``: ``weight_decay`` is added to the gradient.

    Arguments as for :class:`AdamW`.
    """

    _flags = (False,)


class Lion(Optimizer):
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"): one average, and steps of ``lr`` in the
    direction of ``sign(beta1 * average + (1 - beta1) * gradient)``.

    Its authors advise a learning rate 3 to 10 times smaller than AdamW's, with a weight decay as much larger. Arguments
    as for :class:`AdamW`.
    """

    _moments: ClassVar[Moments] = {"exp_avg": torch.int8}
    _tensors = ("exp_avg", "exp_avg_absmax")
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
