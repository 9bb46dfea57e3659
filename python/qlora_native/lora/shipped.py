"""The 4-bit weight that an adapted layer ships as, and training through it.

A block keeps its scale, and its codes become those nearest to W + gain * scale * B A. An adapter changes most elements
by less than half the distance of two levels, so with a gain of 1 almost all codes would stay. With that of
:func:`gain_of` some elements change, each by a whole distance, and along the adapter's own direction the weight moves
as far as the adapter says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_native import _native
from qlora_native.functional import dense_linear
from qlora_native.lora.layer import LoRALinear
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops._direct import call, call_in_derivative
from qlora_native.ops._library import Weight
from qlora_native.weight import QuantizedWeight

SAMPLED_ROWS = 256  # of a weight, from which its gain is found


def shipped_weight(layer: LoRALinear) -> QuantizedWeight:
    """What the layer ships as: new codes [N, K] under the scales of its 4-bit base."""
    value = _base_of(layer).quantized
    return value._with(_requantized(layer.lora_A, layer.lora_B, layer.scale * _gain(layer), value.op_args()))


def shipped_linear(layer: LoRALinear, x: Tensor) -> Tensor:
    """x W'^T + bias with the weight W' that the layer ships as, [..., K] to [..., N].

    Gradients go straight through the rounding: those of A and B are a merged layer's, s B^T dY^T X and s dY^T X A^T,
    and x's is dY W'. W' is a layer's codes, never 16-bit, and is made again in the backward pass.
    """
    base = _base_of(layer)
    arguments = layer.lora_A, layer.lora_B, layer.scale, _gain(layer), base.bias, base._arguments()
    y: Tensor = _StraightThrough.apply(x, *arguments)
    return y


def _base_of(layer: LoRALinear) -> QuantizedLinear:
    assert isinstance(layer.base_layer, QuantizedLinear)
    return layer.base_layer


def _gain(layer: LoRALinear) -> float:
    assert layer.gain is not None
    return layer.gain


def _requantized(a: Tensor, b: Tensor, scale: float, weight: Weight) -> Weight:
    a, b = (matrix.detach().to(weight.packed.device, torch.float32) for matrix in (a, b))
    packed = call("requantize_4bit", a, b, scale, *weight)
    return weight._replace(packed=packed)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, gain: float, bias: Tensor | None, weight: Weight
    ) -> Any:
        ctx.save_for_backward(x, a, b, *weight[:6])
        ctx.rest = scale, gain, weight[6:]
        return call("linear_4bit", x, bias, False, *_requantized(a, b, scale * gain, weight))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, a, b, *tensors = ctx.saved_tensors
        scale, gain, sizes = ctx.rest
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        weight = _requantized(a, b, scale * gain, Weight(*tensors, *sizes))
        low = dense_linear(x, a.to(x.dtype))
        needed = [need_x, False, need_a, need_b]
        grads = call_in_derivative(
            "lora_linear_4bit_backward", grad_y, x, low, a, b, scale, True, needed, False, *weight
        )
        grad_x, _, grad_a, grad_b = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return grad_x, grad_a, grad_b, None, None, None, None


@torch.no_grad()
def gain_of(layer: LoRALinear) -> float:
    """The gain with which the codes move along the adapter's change D as far as D itself: <W' - W, D> = <D, D>.

    An element changes once the gain takes it past the middle between its level and the next one, and then moves by
    their distance. So the gain is found by going through the elements in the order in which they change. They are those
    of rows spread over the weight, and all sums are taken in one order, whatever the number of threads.
    """
    weight = _base_of(layer).quantized
    n, k = weight.shape
    rows = np.arange(0, n, -(-n // SAMPLED_ROWS))
    elements = rows[:, None] * k + np.arange(k)
    number = weight.op_args().quant_type
    levels = _native.levels(number).numpy() if weight.code is None else weight.code.cpu().numpy()
    codes = weight.packed.cpu().numpy()[elements // 2] >> np.where(elements % 2, 0, 4) & 15
    scales = weight.scales().cpu().numpy()[elements // weight.block_size]
    a, b = (matrix.float().cpu().numpy() for matrix in (layer.lora_A, layer.lora_B))
    change = np.einsum("nr,rk->nk", b[rows], a) * layer.scale
    upward = (change > 0) == (scales > 0)
    ordered = np.unique(levels)
    at = np.searchsorted(ordered, levels[codes]) + np.where(upward, 1, -1)
    distance = np.abs(scales) * np.abs(ordered[at.clip(0, len(ordered) - 1)] - levels[codes])
    moves = (distance > 0) & (change != 0)
    size, distance = np.abs(change[moves]).astype(np.float64), distance[moves].astype(np.float64)
    order = np.argsort(distance / size, kind="stable")
    reached = np.cumsum((distance * size)[order])
    wanted = np.square(change.astype(np.float64)).sum()
    last = min(int(np.searchsorted(reached, wanted)), len(order) - 1)
    return max(1.0, float(np.float32(distance[order[last]] / (2 * size[order[last]])))) if len(order) else 1.0
