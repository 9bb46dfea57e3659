"""The factor by which GPTQ hands a column's error on, from the second moments of the inputs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, local

import torch

Factor = tuple[torch.Tensor, torch.Tensor, float]

_one_at_a_time = Lock()
_last = local()  # what this thread factorised last, while that hessian lives: q, k and v share their inputs
# From the asked damping on by tens: a matrix that is no sum of squares stays indefinite beyond this.
LAST_DAMPING = 100.0
FIRST_RAISE = 1e-4
ROWS = 256  # of the factor, rounded to fp32 at a time


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """LAPACK rounds differently on another number of threads."""
    with _one_at_a_time:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def feedback_factor(hessian: torch.Tensor, damping: float) -> Factor | None:
    """What the op ``gptq_4bit`` needs: factor fp32 [K, K], order int64 [K], and the damping that was needed.

    Columns go by falling second moment, equal ones by index. In that order, damped by ``damping`` times the mean of
    its diagonal, H = R R^T with R upper triangular, and factor[i, j] = R[i, j] / R[j, j]. If there is no such R, the
    damping is raised tenfold until there is; None if that does not help. Factorised in fp64.

    Args:
        hessian: fp32 or fp64 [K, K], symmetric, its diagonal not negative and not all zero.
        damping: 0 or more.
    """
    if hessian.is_inference():  # whose changes torch does not count
        return _factorised(hessian, damping)
    memo = _last.__dict__
    about = memo.get("about")
    if about is None or about[0]() is not hessian or about[1:] != (hessian._version, damping):
        memo.clear()
        memo["found"] = _factorised(hessian, damping)
        memo["about"] = weakref.ref(hessian, lambda _: memo.clear()), hessian._version, damping
    found: Factor | None = memo["found"]
    return found


def _factorised(hessian: torch.Tensor, damping: float) -> Factor | None:
    diagonal = torch.diagonal(hessian).double()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = math.fsum(diagonal.tolist()) / diagonal.numel()
    backwards = order.flip(0)  # LAPACK's factor is lower triangular
    while damping <= LAST_DAMPING:
        # Over its mean: a product of tiny or huge moments neither underflows nor overflows. In place, as it is large.
        lower = hessian[backwards][:, backwards].double().div_(mean)
        torch.diagonal(lower).add_(damping)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        with _on_one_thread():
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if int(failed) == 0 and bool(torch.isfinite(lower.sum())):
            return _over_diagonal(lower), order, damping
        damping = max(10 * damping, FIRST_RAISE)
    return None


def _over_diagonal(lower: torch.Tensor) -> torch.Tensor:
    """The factor, fp32 [K, K], of the one that LAPACK made for the columns in reverse, fp64, a few rows at a time."""
    size = len(lower)
    factor = torch.empty(size, size, device=lower.device)
    diagonal = torch.diagonal(lower).flip(0)
    for begin in range(0, size, ROWS):
        end = min(begin + ROWS, size)
        factor[begin:end] = lower[size - end : size - begin].flip(0, 1) / diagonal
    return factor
