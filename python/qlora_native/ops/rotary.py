"""rotary: position embedding by rotation, dimension i of a head paired with i + D/2. Backward keeps only the angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import Run, autograd, fake, implement, implement_natively


@fake("rotary")
def shapes(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The output, uninitialized in x's layout."""
    if x.shape[-1] % 2 or x.shape[-1] == 0 or cos.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"rotary: x is {list(x.shape)}, cos is {list(cos.shape)}, sin is {list(sin.shape)}: "
            "expected x [B, H, T, D] with an even D, cos and sin [B, T, D] or [1, T, D]."
        )
    heads_inside = x.transpose(1, 2)
    if heads_inside.is_contiguous():  # as products make them and take them, without a copy
        return empty_like(x, heads_inside.shape).transpose(1, 2)
    return torch.empty_like(x)


@implement("rotary", "CompositeExplicitAutograd")
def anywhere(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return shapes(x, cos, sin, inverse).copy_(reference.rotary(x, cos, sin, inverse))


@implement_natively("rotary", anywhere)
def native(run: Run, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = shapes(x, cos, sin, inverse)
    source = x if x.stride(-1) == 1 else x.contiguous()
    target = y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
    cos, sin = cos.contiguous(), sin.contiguous()
    angles = cos.data_ptr(), sin.data_ptr(), cos.shape[0]
    heads = DTYPE_NUMBER[x.dtype], source.data_ptr(), source.stride()[:3]
    run(*heads, *angles, tuple(x.shape), inverse, target.data_ptr(), target.stride()[:3])
    return y if target is y else y.copy_(target)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("rotary: cos and sin have no gradient here: detach them.")
    return call("rotary", grad_y, *ctx.saved_tensors, not ctx.inverse), None, None, None


autograd("rotary", _backward, _setup)
