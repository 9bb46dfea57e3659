"""swiglu: silu(gate) * up. Backward keeps gate and up, which their own layers made, and computes silu again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._native import DTYPE_NUMBER
from qlora_native._pages import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import Run, autograd, fake, implement, implement_natively, save_inputs

Pair = tuple[Tensor, Tensor]


@fake("swiglu")
def shapes(gate: Tensor, up: Tensor) -> Tensor:
    """The output, uninitialized."""
    return empty_like(gate)


@implement("swiglu", "CompositeExplicitAutograd")
def anywhere(gate: Tensor, up: Tensor) -> Tensor:
    return shapes(gate, up).copy_(reference.swiglu(gate, up))


@implement_natively("swiglu", anywhere)
def native(run: Run, gate: Tensor, up: Tensor) -> Tensor:
    y, gate, up = shapes(gate, up), gate.contiguous(), up.contiguous()
    run(DTYPE_NUMBER[gate.dtype], gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr())
    return y


@implement("swiglu_backward", "CompositeExplicitAutograd")
def anywhere_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> Pair:
    grad_gate, grad_up = reference.swiglu_backward(grad_y, gate, up)
    return grad_gate.contiguous(), grad_up.contiguous()


@implement_natively("swiglu_backward", anywhere_backward)
def native_backward(run: Run, grad_y: Tensor, gate: Tensor, up: Tensor) -> Pair:
    grad_y, gate, up = grad_y.contiguous(), gate.contiguous(), up.contiguous()
    grads = empty_like(gate), empty_like(up)
    source = DTYPE_NUMBER[gate.dtype], grad_y.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.numel()
    run(*source, grads[0].data_ptr(), grads[1].data_ptr())
    return grads


@fake("swiglu_backward")
def backward_shapes(grad_y: Tensor, gate: Tensor, up: Tensor) -> Pair:
    return empty_like(gate), empty_like(up)


def _backward(ctx: Any, grad_y: Tensor) -> Pair:
    if torch.is_grad_enabled():  # these gradients are differentiated in turn
        return reference.swiglu_backward(grad_y, *ctx.saved_tensors)
    grads: Pair = call("swiglu_backward", grad_y, *ctx.saved_tensors)
    return grads


autograd("swiglu", _backward, save_inputs)
