"""swiglu: silu(gate) * up, silu(g) = g * sigmoid(g).

Backward keeps gate and up, which their own layers made, and computes silu again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import reference
from qlora_native._buffers import empty_like
from qlora_native.ops._direct import call
from qlora_native.ops._library import Function, autograd, define, save_inputs

Pair = tuple[Tensor, Tensor]


def output(gate: Tensor, up: Tensor) -> Tensor:
    return empty_like(gate)


def native(run: Function, y: Tensor, gate: Tensor, up: Tensor) -> None:
    run(gate.dtype, gate.contiguous(), up.contiguous(), gate.numel(), y)


define("swiglu", output, reference.swiglu, native)


def grad_outputs(grad_y: Tensor, gate: Tensor, up: Tensor) -> Pair:
    return empty_like(gate), empty_like(up)


def native_grad(run: Function, grads: Pair, *operands: Tensor) -> None:
    grad_y, gate, up = (tensor.contiguous() for tensor in operands)
    run(gate.dtype, grad_y, gate, up, gate.numel(), *grads)


define("swiglu_backward", grad_outputs, reference.swiglu_backward, native_grad)


def _backward(ctx: Any, grad_y: Tensor) -> Pair:
    if torch.is_grad_enabled():  # these gradients are differentiated in turn
        return reference.swiglu_backward(grad_y, *ctx.saved_tensors)
    return call("swiglu_backward", grad_y, *ctx.saved_tensors)


autograd("swiglu", _backward, save_inputs)
