"""What the ops of products share: an :class:`Engine` a device, rows, autocast, and what backward keeps of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native.ops._direct import call, may_autocast
from qlora_native.ops._operands import WIDE, Weight


class Adapter(NamedTuple):
    """What a low-rank adapter adds to a product, ``low @ up`` in the product's own sums.

    ``low`` is [M, r]; ``up`` is [N, r] (used transposed) for a forward product and [r, K] for an input gradient. With
    ``down`` ([r, K], or [N, r]) the product fills ``low`` itself: ``down_scale`` times x down^T or x down.
    """

    low: Tensor
    up: Tensor
    down: Tensor | None = None
    down_scale: float = 1.0


class Engine:
    """Products composed of ops that have a kernel for each device and derivatives of their own."""

    makes_low = False  # whether an adapter may carry ``down``

    def product(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """With a frozen weight W [N, K], in x's dtype.

        Forward x W^T + bias + low up^T for x [M, K], which is [M, N]; else, as its input gradient, x W + low up for
        x [M, N], which is [M, K]. Here the first product is rounded before the second is added; a native one adds bias
        and adapter to its sums in fp32 and rounds once.
        """
        y = self.plain(is_forward, x, weight, bias)
        if adapter is None:
            return y
        return torch.addmm(y, adapter.low, adapter.up.t() if is_forward else adapter.up)

    def plain(self, is_forward: bool, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """:meth:`product` without an adapter."""
        y: Tensor = (
            call("linear_4bit", x, bias, weight)
            if is_forward
            else call("linear_4bit_grad_input", x, weight)
        )
        return y

    def dense(
        self,
        is_forward: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """With a dense W [N, K] of x's dtype, in ``out``, if one is given.

        Forward x W^T + bias for x [M, K], without a bias in ``out``; else scale * x W for x [M, N].
        """
        if is_forward and bias is not None:
            return torch.addmm(bias.to(x.dtype), x, weight.t())
        product = torch.mm(x, weight.t() if is_forward else weight, out=out)
        return product if scale == 1.0 else torch.mul(product, scale, out=out)

    def low(self, x: Tensor, down: Tensor) -> Tensor:
        """x A^T for x [M, K] and A [r, K], with the bits that a product gives it that makes it itself."""
        return self.dense(True, x, down)

    def adapter(self, matrix: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """:meth:`narrow` of an adapter's matrix, which an engine may keep."""
        return self.narrow(matrix, dtype, scale)

    def grad_low(self, grad_y: Tensor, b: Tensor, scale: float) -> Tensor:
        """scale * grad_y B for grad_y [M, N] and an adapter's B [N, r]. Returns [M, r] in grad_y's dtype."""
        return self.dense(False, grad_y, self.narrow(b, grad_y.dtype), scale=scale)

    def narrow(self, tensor: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """scale * tensor, rounded once to ``dtype``, contiguous."""
        if scale != 1.0:
            tensor = tensor.to(WIDE[tensor.dtype]) * scale
        return tensor.to(dtype).contiguous()

    def outer(
        self, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, transposed: bool = False
    ) -> Tensor:
        """scale * left^T right, for left [M, r] and right [M, C]: [r, C] in ``dtype``, or ``transposed`` [C, r]."""
        wide = torch.promote_types(left.dtype, dtype)
        if transposed:
            left, right = right, left
        return self.narrow(torch.mm(left.t().to(wide), right.to(wide)), dtype, scale)


ANY = Engine()


def address(tensor: Tensor | None) -> int:
    """For a native function; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def as_rows(tensor: Tensor) -> Tensor:
    """[..., K] as [M, K]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def unflattened(rows: Tensor, leading: Sequence[int]) -> Tensor:
    """[M, N] as [..., N], which is no view for autograd: Falcon and Gemma 3n change such an output in place."""
    return _unsafe_view(rows, (*leading, rows.shape[-1]))


_unsafe_view = torch.ops.aten._unsafe_view.default
_UNCHANGED = nullcontext()


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would do to the operands of torch's own linear layer, of which the first is a tensor."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside a kernel the operands already have their final dtype; autocast must not touch them again."""
    return torch.autocast(x.device.type, enabled=False) if may_autocast() else _UNCHANGED


def save_weight(ctx: Any, weight: Weight, *tensors: Tensor | None) -> None:
    """Keep the packed weight and ``tensors`` for backward: never anything dequantized."""
    ctx.save_for_backward(*weight[:6], *tensors)
    ctx.numbers_of_weight = weight[6:]


def saved_weight(ctx: Any) -> tuple[Weight, tuple[Tensor, ...]]:
    """The weight and the other saved tensors."""
    saved = ctx.saved_tensors
    return tuple.__new__(Weight, (*saved[:6], *ctx.numbers_of_weight)), saved[6:]


def sum_to_bias(grad_y: Tensor) -> Tensor:
    """Gradient of a bias [N] from grad_y [..., N], in fp32 or wider; autograd casts it to the bias's dtype."""
    return as_rows(grad_y).sum(0, dtype=WIDE[grad_y.dtype])
