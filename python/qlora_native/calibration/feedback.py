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
_last = local()  # what this thread factorized last, while that hessian lives: q, k and v share their inputs
# From the asked damping on by tens: a matrix that is no sum of squares stays indefinite beyond this.
LAST_DAMPING = 100.0
FIRST_RAISE = 1e-4
ROWS = 64  # of a matrix, copied at a time


@contextmanager
def on_one_thread() -> Iterator[None]:
    """LAPACK and sums round differently on another number of threads. One caller after another."""
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
    damping is raised tenfold until there is; None if that does not help. Factorized in fp64.

    Args:
        hessian: fp32 or fp64 [K, K], symmetric, its diagonal not negative and not all zero.
        damping: 0 or more.
    """
    if hessian.is_inference():  # whose changes torch does not count
        return _factorized(hessian, damping)
    memo = _last.__dict__
    about = memo.get("about")
    if about is None or about[0]() is not hessian or about[1:] != (hessian._version, damping):
        memo.clear()
        memo["found"] = _factorized(hessian, damping)
        memo["about"] = weakref.ref(hessian, lambda _: memo.clear()), hessian._version, damping
    found: Factor | None = memo["found"]
    return found


def _factorized(hessian: torch.Tensor, damping: float) -> Factor | None:
    diagonal = torch.diagonal(hessian).double()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = math.fsum(diagonal.tolist()) / diagonal.numel()
    with on_one_thread():  # and one matrix at a time, which is the largest thing that calibrating holds
        columns = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
        while damping <= LAST_DAMPING:
            _fill(columns, hessian, order.flip(0), mean, damping)  # LAPACK's factor is lower triangular
            turned = columns.t()  # the same matrix as LAPACK lays it out, so that nothing is copied
            failed = torch.empty((), dtype=torch.int32, device=hessian.device)
            torch.linalg.cholesky_ex(turned, upper=True, out=(turned, failed))
            if int(failed) == 0 and bool(torch.isfinite(columns.sum())):
                return _over_diagonal(columns), order, damping
            damping = max(10 * damping, FIRST_RAISE)
    return None


def _fill(target: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, mean: float, damping: float) -> None:
    """The damped hessian in that order, over its mean: a product of tiny or huge moments neither underflows nor
    overflows."""
    for begin in range(0, len(order), ROWS):
        rows = order[begin : begin + ROWS]
        target[begin : begin + ROWS] = hessian[rows].index_select(1, order)
    target.div_(mean)
    torch.diagonal(target).add_(damping)


def _over_diagonal(lower: torch.Tensor) -> torch.Tensor:
    """The factor, fp32 [K, K], of the one that was made for the columns in reverse, fp64 [K, K]; it takes the first
    half of that one's memory."""
    size = len(lower)
    factor = lower.view(-1).view(torch.float32)[: size * size].view(size, size)
    for begin in range(0, size // 2, ROWS):  # both axes reversed: rows from the two ends change places
        end = min(begin + ROWS, size // 2)
        first = lower[begin:end].flip(0, 1)
        lower[begin:end] = lower[size - end : size - begin].flip(0, 1)
        lower[size - end : size - begin] = first
    if size % 2:
        lower[size // 2] = lower[size // 2].flip(0)
    diagonal = torch.diagonal(lower).clone()
    for begin in range(0, size, ROWS):  # a row of the factor never lies behind the row that it is made of
        factor[begin : begin + ROWS] = lower[begin : begin + ROWS] / diagonal
    return factor
