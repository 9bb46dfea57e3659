"""Parameters cut over ranks (DTensors, as FSDP2 makes them): each rank steps its own part, and only the norm of the
gradients and the states that leave the optimizer know of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native.ops._optim_plan import part_of as local

__all__ = ["is_sharded", "local", "whole_norm", "whole_states"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return local(tensor) is not tensor


def whole_norm(params: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients of which ``grads`` are this rank's parts: every rank gets the same number."""
    squares: dict[Any, list[Tensor]] = {}
    for param, grad in zip(params, grads, strict=True):
        squares.setdefault(getattr(param, "_spec", None) and (param.device_mesh, param.placements), []).append(grad)  # type: ignore[attr-defined]
    total = 0.0
    for where, parts in squares.items():
        square = _square_of(parts)
        if where is not None:
            mesh, placements = where
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    shared = torch.tensor(square, dtype=torch.float64, device=parts[0].device)
                    torch.distributed.all_reduce(shared, group=mesh.get_group(dimension))
                    square = float(shared)
        total += square
    return math.sqrt(total)


def _square_of(grads: Sequence[Tensor]) -> float:
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    return sum(float(torch.ops.qlora_native.gradient_norm(part)) ** 2 for part in by_device.values())


def whole_states(param: Tensor, state: dict[str, Any], moments: Sequence[str]) -> dict[str, Any]:
    """The states of a cut parameter as they leave the optimizer: DTensors cut like it, fp32.

    8-bit states are decoded, because the blocks that share a scale end where a rank's part ends: any other number of
    ranks has other blocks. Coded again in the same blocks they are the same bytes.
    """
    told = {name: value for name, value in state.items() if not name.endswith("_absmax")}
    for name in moments:
        part, absmax = state[name], state.get(f"{name}_absmax")
        wide = part if absmax is None else reference.decode_state(part, absmax)
        told[name] = shard_like(param, wide)
    return told


def shard_like(param: Tensor, part: Tensor) -> Tensor:
    """A DTensor of the shape of a cut parameter, and cut as it is, of which ``part`` is this rank's."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
