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

from qlora_native.optim.paging import PagingStatistics
from qlora_native.optim.rules import Adam, AdamW, Lion

__all__ = ["Adam", "AdamW", "Lion", "PagingStatistics"]
