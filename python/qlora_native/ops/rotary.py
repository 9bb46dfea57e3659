"""rotary: position embedding by rotation. Dimensions i and i + D/2 of a head are one point, its position the angle.

The gradient is the rotation back, ``inverse``: backward keeps only the angles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._buffers import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import Function, Values, autograd, define


def output(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """In x's layout."""
    if x.shape[-1] % 2 or x.shape[-1] == 0 or cos.shape != sin.shape:
        raise ValueError(
            f"rotary: x is {list(x.shape)}, cos is {list(cos.shape)}, sin is {list(sin.shape)}: "
            "expected x [B, H, T, D] with an even D, cos and sin of one shape."
        )
    heads_inside = x.transpose(1, 2)
    if heads_inside.is_contiguous():  # as products make them and take them, without a copy
        return empty_like(x, heads_inside.shape).transpose(1, 2)
    return torch.empty_like(x)


def native(run: Function, y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    # The kernel takes any strides but that of the last axis.
    source = x if x.stride(-1) == 1 else x.contiguous()
    target = y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
    angles = (cos.contiguous(), sin.contiguous(), cos.shape[0])
    run(
        x.dtype,
        source,
        source.stride()[:3],
        *angles,
        tuple(x.shape),
        inverse,
        target,
        target.stride()[:3],
    )
    if target is not y:
        y.copy_(target)


define("rotary", output, reference.rotary, native)


def _setup(ctx: Any, inputs: Values, output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_y: Tensor) -> Values:
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("rotary: cos and sin have no gradient here: detach them.")
    return call("rotary", grad_y, *ctx.saved_tensors, not ctx.inverse), None, None, None


autograd("rotary", _backward, _setup)
