"""Adapters that begin with what 4 bits lost: a low-rank approximation of the difference to the 16-bit weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Directions beyond the rank, and rounds, of the subspace iteration (Halko, Martinsson and Tropp, "Finding structure
# with randomness", 2011). What 4 bits lose has a flat spectrum, on which it converges slowly but to as good a subspace.
EXTRA, ROUNDS = 16, 8


@dataclass(frozen=True)
class LayerStatistics:
    """What an adapter's start needs to know of one layer.

    Attributes:
        path: of the layer in the model.
        weight: the 16-bit weight that the layer's 4-bit one stands for, [N, K].
        metric: of the layer's inputs x: E[x_k^2], fp32 [K], or E[x x^T], fp32 [K, K], each to a common factor; None
            counts all inputs alike.
    """

    path: str
    weight: Tensor
    metric: Tensor | None = None


@torch.no_grad()
def residual_factors(
    residual: Tensor, rank: int, scale: float, metric: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The A and B for which scale * B A is nearest to a residual in the norm trace(E H E^T).

    If U are the first ``rank`` left singular vectors of residual H^(1/2), which are eigenvectors of residual H
    residual^T, the best approximation is U U^T residual (Eckart and Young, 1936): neither a root of H nor its inverse
    is needed, and a singular H is as good as any. U is found by subspace iteration. The rows of A and the columns of B
    get equal norms.

    Args:
        residual: fp32 [N, K], the 16-bit weight less the decoded one.
        rank: columns of B; beyond min(N, K) they are zero, and A's rows with them.
        scale: what the adapter multiplies B A by.
        metric: H: fp32 [K, K], or its diagonal, fp32 [K]; None is the identity.
        seed: of the subspace that the iteration begins with.

    Returns:
        A, fp32 [rank, K], and B, fp32 [N, rank].

    Raises:
        ValueError: shapes that do not fit, or a metric that is not finite.
    """
    n, k = residual.shape
    if metric is not None and (list(metric.shape) not in ([k], [k, k]) or not bool(torch.isfinite(metric).all())):
        raise ValueError(
            f"residual_factors: metric is {list(metric.shape)}: expected [{k}] or [{k}, {k}] of finite numbers for a "
            f"residual {list(residual.shape)}."
        )
    width = min(rank + EXTRA, n, k)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, width, generator=generator).to(residual.device)
    basis = torch.linalg.qr(start)[0]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(_weighted(residual.t() @ basis, metric, residual))[0]
    seen = _weighted(residual.t() @ basis, metric, residual)
    _, vectors = torch.linalg.eigh(basis.t() @ seen)
    kept = min(rank, width)
    u = basis @ vectors[:, -kept:].flip(1)
    down = (u.t() @ residual) / scale
    norms = torch.linalg.vector_norm(down, dim=1)
    share = norms.sqrt()
    a, b = residual.new_zeros(rank, k), residual.new_zeros(n, rank)
    a[:kept] = down * torch.where(share > 0, 1 / share, 0.0)[:, None]
    b[:, :kept] = u * share
    return a, b


def _weighted(x: Tensor, metric: Tensor | None, residual: Tensor) -> Tensor:
    """residual H x for x [K, columns]."""
    if metric is not None:
        x = metric[:, None] * x if metric.dim() == 1 else metric @ x
    return residual @ x
